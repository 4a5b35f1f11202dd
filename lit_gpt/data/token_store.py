"""The token store: one split of a data set on disk, as the builder writes it and the trainer reads it.

A store is a folder:

    00000.tokens        header | token ids, little-endian uint16 or uint32 | footer
    00000.docs.parquet  one row per document: end (exclusive, in tokens of this shard), id, source file, line
    MANIFEST.json       shards with sizes and hashes, tokenizer, counts; its sha256 is the id of the data set

Invariants: the manifest is published last; without it there is no data set, and files that it does not name are
ignored. A document, its EOS included, lies in one shard; where documents end is read from the `end` column, never found
by a search for EOS. shard_file.py describes the .tokens file.
Costs: opening a store only parses the manifest (0.05 s at 15,000 shards). A writer holds its one shard in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.data.shard_file import (
    BLOCK_BYTES,
    HEADER_BYTES,
    DamagedShard,
    Shard,
    ShardFile,
    Vocabulary,
    frame,
)
from lit_gpt.files import publish
from lit_gpt.values import no_such_folder

__all__ = [
    "BLOCK_BYTES", "HEADER_BYTES", "MANIFEST", "SHARD_TOKENS", "DamagedShard", "Shard", "ShardFile", "ShardWriter",
    "TokenStore", "Vocabulary", "document_ends", "documents", "shard_name", "write_manifest", "write_store",
]  # fmt: skip

MANIFEST_VERSION = 1
MANIFEST = "MANIFEST.json"
SHARD_TOKENS = 1 << 26
"""Default shard size, in tokens."""


@dataclass(frozen=True)
class TokenStore:
    """One split, as its manifest describes it."""

    path: Path
    split: str
    shards: tuple[Shard, ...]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    tokenizer_fingerprint: str
    documents: int
    tokens: int
    text_bytes: int
    """UTF-8 bytes of all document texts: the divisor of bits per byte."""
    dataset_id: str
    """sha256 of MANIFEST.json's bytes, in hex."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The builder's settings that determine the bytes."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenStore:
        """Read the manifest in folder `path`, and nothing else; BadInput where there is none, or a damaged one."""
        path = Path(path)
        try:
            raw = (path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise BadInput(f"no data set in {path}: {_why_no_manifest(path)}") from None
        except OSError as error:
            raise BadInput(f"cannot read {path / MANIFEST}: {error.strerror}") from None
        try:
            content = json.loads(raw)
            version = content.pop("format_version")
            if version != MANIFEST_VERSION:
                raise BadInput(f"{path / MANIFEST} is of format {version}, this program reads {MANIFEST_VERSION}")
            content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
            store = cls(path=path, dataset_id=hashlib.sha256(raw).hexdigest(), **content)
            whole = sum(shard.tokens for shard in store.shards) == store.tokens
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{path / MANIFEST} is damaged ({type(error).__name__}: {error}): build it again") from None
        if not whole:
            raise BadInput(f"{path / MANIFEST} is damaged (its shards do not add up to its tokens): build it again")
        return store

    def targets(self, *, cross_document_attention: bool) -> int:
        """Valid targets of an epoch in the packing `window`: all tokens but each document's first; or, with
        cross_document_attention, all but each shard's first."""
        firsts = sum(shard.tokens > 0 for shard in self.shards) if cross_document_attention else self.documents
        return self.tokens - firsts

    @property
    def add_bos(self) -> bool:
        """Whether each document begins with BOS."""
        return bool(self.settings.get("add_bos", False))

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer_fingerprint, self.vocab_size, self.bos_id, self.eos_id)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.vocabulary.dtype


def _why_no_manifest(path: Path) -> str:
    if not path.is_dir():
        wanted = "that is a file; give a folder that scripts/prepare_data.py wrote"
        return wanted if path.is_file() else no_such_folder(path)
    splits = sorted(child.parent.name for child in path.glob(f"*/{MANIFEST}"))
    if splits:
        return f"{MANIFEST} is missing; did you mean {' or '.join(str(path / split) for split in splits)}?"
    return f"{MANIFEST} is missing (the build did not finish, or this is another folder)"


def documents(store: TokenStore, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    """The shard's documents as a table: end, id, source, line. Raises DamagedShard unless bytes and hash are the
    manifest's."""
    path = store.path / f"{shard.name}.docs.parquet"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DamagedShard(f"{path}: missing, and its manifest names it") from None
    if len(raw) != shard.docs_bytes or xxhash.xxh3_64_hexdigest(raw) != shard.docs_xxh3:
        raise DamagedShard(f"{path}: its {len(raw)} bytes do not hash to {shard.docs_xxh3}, as the manifest says")
    # Without pyarrow's pools: a process that ends just as they start their threads is aborted (seen with pyarrow 26).
    table = pq.ParquetFile(pa.BufferReader(raw), pre_buffer=False).read(columns=columns, use_threads=False)
    if table.num_rows != shard.documents:
        raise DamagedShard(f"{path}: {table.num_rows} documents where the manifest says {shard.documents}")
    return table


def document_ends(store: TokenStore, shard: Shard) -> npt.NDArray[np.int64]:
    """Where the shard's documents end, in tokens: exclusive, ascending, the last equal to shard.tokens. Raises
    DamagedShard."""
    ends = documents(store, shard, ["end"])["end"].to_numpy()
    if len(ends) == 0 or ends[-1] != shard.tokens or ends[0] <= 0 or np.any(np.diff(ends) <= 0):
        raise DamagedShard(
            f"{store.path / shard.name}.docs.parquet: its document ends do not fit {shard.tokens} tokens"
        )
    return ends


class ShardWriter:
    """Collects the documents of one shard in memory; `close` publishes its two files."""

    def __init__(self, path: str | os.PathLike[str], name: str, vocabulary: Vocabulary) -> None:
        self.path = Path(path)
        self.name = name
        self.vocabulary = vocabulary
        self.tokens = 0
        self._ids: list[npt.NDArray[Any]] = []
        self._records: list[tuple[int, str, str, int]] = []

    def add(self, ids: Sequence[int] | npt.NDArray[Any], document_id: str, source: str = "", line: int = 0) -> None:
        """Append one document: its token ids as they are stored, EOS included."""
        array = np.asarray(ids)
        if not len(array) or array.min() < 0 or array.max() >= self.vocabulary.size:
            raise ValueError(f"document {document_id}: {len(array)} ids, not all of 0 to {self.vocabulary.size - 1}")
        self._ids.append(array.astype(self.vocabulary.dtype))
        self.tokens += len(array)
        self._records.append((self.tokens, document_id, source, line))

    def close(self) -> Shard:
        """Publish the shard; returns its manifest entry."""
        tokens = np.concatenate([np.empty(0, self.vocabulary.dtype), *self._ids])
        parts = frame(tokens, len(self._records), self.vocabulary)
        whole = xxhash.xxh3_64()
        for part in parts:
            whole.update(part)
        records = _parquet(self._records)
        publish(self.path / f"{self.name}.tokens", parts)
        publish(self.path / f"{self.name}.docs.parquet", [records])
        return Shard(
            name=self.name,
            tokens=self.tokens,
            documents=len(self._records),
            bytes=sum(len(part) for part in parts),
            xxh3=whole.hexdigest(),
            docs_bytes=len(records),
            docs_xxh3=xxhash.xxh3_64_hexdigest(records),
        )


def write_manifest(
    path: str | os.PathLike[str],
    shards: Sequence[Shard],
    vocabulary: Vocabulary,
    *,
    split: str,
    text_bytes: int,
    settings: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Publish the manifest of folder `path`, whose shards are all published."""
    content = {
        "format_version": MANIFEST_VERSION,
        "split": split,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "text_bytes": text_bytes,
        "vocab_size": vocabulary.size,
        "bos_id": vocabulary.bos_id,
        "eos_id": vocabulary.eos_id,
        "tokenizer_fingerprint": vocabulary.fingerprint,
        "settings": dict(settings or {}),
    }
    lines = ",\n".join(json.dumps(shard._asdict()) for shard in shards)
    text = json.dumps(content, indent=1, ensure_ascii=False)[:-2] + f',\n "shards": [\n{lines}\n]\n}}\n'
    publish(Path(path) / MANIFEST, [text.encode()])
    return TokenStore.open(path)


def write_store(
    path: str | os.PathLike[str],
    documents: Iterable[tuple[str, Sequence[int]]],
    *,
    tokenizer_fingerprint: str,
    vocab_size: int,
    bos_id: int | None,
    eos_id: int | None,
    shard_tokens: int = SHARD_TOKENS,
    split: str = "train",
) -> TokenStore:
    """Write a store from (document id, token ids as stored), in that order. As text_bytes, each token counts one."""
    Path(path).mkdir(parents=True, exist_ok=True)
    vocabulary = Vocabulary(tokenizer_fingerprint, vocab_size, bos_id, eos_id)
    shards: list[Shard] = []
    writer = ShardWriter(path, shard_name(0), vocabulary)
    for document_id, ids in documents:
        if writer.tokens and writer.tokens + len(ids) > shard_tokens:
            shards.append(writer.close())
            writer = ShardWriter(path, shard_name(len(shards)), vocabulary)
        writer.add(ids, document_id)
    if writer.tokens:
        shards.append(writer.close())
    return write_manifest(path, shards, vocabulary, split=split, text_bytes=sum(shard.tokens for shard in shards))


def shard_name(index: int) -> str:
    return f"{index:05d}"


def _parquet(records: Sequence[tuple[int, str, str, int]]) -> bytes:
    ends, ids, sources, lines = zip(*records, strict=True) if records else ((), (), (), ())
    table = pa.table(
        {
            "end": pa.array(ends, pa.int64()),
            "id": pa.array(ids, pa.string()),
            "source": pa.array(sources, pa.string()),
            "line": pa.array(lines, pa.int64()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["source"])
    return sink.getvalue()
