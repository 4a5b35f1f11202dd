"""Token shards on disk: the one format between the builder and the trainer, its writer, its reader, its checks.

One folder holds one split:

    00000.tokens        header | token ids, little-endian uint16 or uint32 | footer
    00000.docs.parquet  one record a document: end (exclusive, in tokens of this shard), id, source file, line
    MANIFEST.json       shards with sizes and hashes, tokenizer, counts; its sha256 is the id of the data set

Invariants: the manifest is written last, by rename; without it there is no data set, and a file it does not name is
ignored. A document lies in one shard, its EOS included; boundaries are the `end` column, never a search for EOS. The
footer holds one xxh3 per MiB of token bytes, so that damage can be located, and a file's size follows from its header,
so that truncation shows without reading it.
Costs: opening a store parses the manifest only (0.1 s at 15,000 shards); opening a shard reads its header and 8 bytes.
A writer holds its one shard in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lit_gpt.cli import BadInput

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
HEADER_BYTES = 256
"""Token ids begin here in every .tokens file."""
BLOCK_BYTES = 1 << 20
"""Token bytes that one hash of the footer covers."""
SHARD_TOKENS = 1 << 26
"""Default size of a shard."""

_MAGIC = b"LLMtoks\n"
_END_MAGIC = b"\nLLMend\n"
_HEADER = struct.Struct("<8sIIQQIii64s")
_SEAL = struct.Struct("<QQ8s")  # end of the footer: xxh3 of the header, xxh3 of the block hashes, end magic
_NO_ID = -1


class DamagedShard(ValueError):
    """A file of a store is not what its manifest or its hashes say: which file, where in it, what was expected."""


class Shard(NamedTuple):
    """One entry of a manifest."""

    name: str
    tokens: int
    documents: int
    bytes: int
    xxh3: str
    docs_bytes: int
    docs_xxh3: str


class Vocabulary(NamedTuple):
    """What a shard must know of the tokenizer that made it."""

    fingerprint: str
    size: int
    bos_id: int | None
    eos_id: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.size <= 65_535 else "<u4")


@dataclass(frozen=True)
class TokenStore:
    """The manifest of one split, as opened."""

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
    """What the builder was asked for, where it changes the bytes."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenStore:
        """Read the manifest of the split in folder `path`, and nothing else."""
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
            if version != FORMAT_VERSION:
                raise BadInput(f"{path / MANIFEST} is of format {version}, this program reads {FORMAT_VERSION}")
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

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer_fingerprint, self.vocab_size, self.bos_id, self.eos_id)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.vocabulary.dtype


def _why_no_manifest(path: Path) -> str:
    if not path.is_dir():
        return "there is no such folder"
    splits = sorted(child.parent.name for child in path.glob(f"*/{MANIFEST}"))
    if splits:
        return f"{MANIFEST} is missing; did you mean {' or '.join(str(path / split) for split in splits)}?"
    return f"{MANIFEST} is missing (the build did not finish, or this is another folder)"


class ShardFile:
    """One open .tokens file, read with pread: threads may share it, and a file that shrinks is an error, not a crash.

    `path` is the folder that the file lies in: the store's own, or that of a staged copy.
    """

    def __init__(self, path: str | os.PathLike[str], shard: Shard, store: TokenStore) -> None:
        self.path = Path(path) / f"{shard.name}.tokens"
        self.shard = shard
        self.dtype = store.dtype
        self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            self._check_frame(store.vocabulary)
        except BaseException:
            self.close()
            raise

    def _check_frame(self, vocabulary: Vocabulary) -> None:
        size = os.fstat(self._descriptor).st_size
        expected = _file_bytes(self.shard.tokens, self.dtype)
        if not size == expected == self.shard.bytes:
            raise DamagedShard(f"{self.path}: {size} bytes where {self.shard.bytes} belong (cut short or replaced)")
        if self._pread(0, HEADER_BYTES) != _header(self.shard.tokens, self.shard.documents, vocabulary):
            raise DamagedShard(f"{self.path}: its header is not that of shard {self.shard.name} of this data set")
        if self._pread(size - len(_END_MAGIC), len(_END_MAGIC)) != _END_MAGIC:
            raise DamagedShard(f"{self.path}: its end mark is missing")

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Token ids [start, stop) of the shard."""
        if not 0 <= start <= stop <= self.shard.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.path}, which holds {self.shard.tokens}")
        width = self.dtype.itemsize
        return np.frombuffer(self._pread(HEADER_BYTES + start * width, (stop - start) * width), self.dtype)

    def verify(self) -> None:
        """Hash every block against the footer and the file against the manifest; the first damage is located."""
        end = HEADER_BYTES + self.shard.tokens * self.dtype.itemsize
        footer = self._pread(end, self.shard.bytes - end)
        header_hash, blocks_hash, _ = _SEAL.unpack(footer[-_SEAL.size :])
        hashes = np.frombuffer(footer[: -_SEAL.size], "<u8")
        header = self._pread(0, HEADER_BYTES)
        if xxhash.xxh3_64_intdigest(header) != header_hash:
            raise DamagedShard(f"{self.path}: the header does not hash to {header_hash:016x}")
        if xxhash.xxh3_64_intdigest(hashes.tobytes()) != blocks_hash:
            raise DamagedShard(f"{self.path}: the block hashes in the footer do not hash to {blocks_hash:016x}")
        whole = xxhash.xxh3_64(header)
        for block, expected in enumerate(hashes.tolist()):
            start = HEADER_BYTES + block * BLOCK_BYTES
            data = self._pread(start, min(BLOCK_BYTES, end - start))
            if (found := xxhash.xxh3_64_intdigest(data)) != expected:
                raise DamagedShard(
                    f"{self.path}: block {block} (bytes {start} to {start + len(data)}) hashes to {found:016x}, "
                    f"not to {expected:016x}"
                )
            whole.update(data)
        whole.update(footer)
        if whole.hexdigest() != self.shard.xxh3:
            raise DamagedShard(f"{self.path}: whole, but not the file of the manifest (xxh3 {self.shard.xxh3})")

    def _pread(self, start: int, count: int) -> bytes:
        parts = []
        while count:
            part = os.pread(self._descriptor, count, start)
            if not part:
                raise DamagedShard(f"{self.path}: ends at byte {start}, {count} bytes early (truncated while open)")
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def documents(store: TokenStore, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    """The shard's document records (end, id, source, line), hash and order verified."""
    path = store.path / f"{shard.name}.docs.parquet"
    raw = path.read_bytes()
    if len(raw) != shard.docs_bytes or xxhash.xxh3_64_hexdigest(raw) != shard.docs_xxh3:
        raise DamagedShard(f"{path}: {len(raw)} bytes that do not hash to {shard.docs_xxh3} as the manifest says")
    table = pq.read_table(pa.BufferReader(raw), columns=columns)
    if table.num_rows != shard.documents:
        raise DamagedShard(f"{path}: {table.num_rows} documents where the manifest says {shard.documents}")
    return table


def document_ends(store: TokenStore, shard: Shard) -> npt.NDArray[np.int64]:
    """End offsets of the shard's documents in tokens: exclusive, ascending, the last equal to shard.tokens."""
    ends = documents(store, shard, ["end"])["end"].to_numpy()
    if len(ends) == 0 or ends[-1] != shard.tokens or ends[0] <= 0 or np.any(np.diff(ends) <= 0):
        raise DamagedShard(f"{store.path / shard.name}.docs.parquet: its ends do not cut {shard.tokens} tokens")
    return ends


class ShardWriter:
    """Collects the documents of one shard and writes its two files, each by rename, when closed."""

    def __init__(self, path: str | os.PathLike[str], name: str, vocabulary: Vocabulary) -> None:
        self.path = Path(path)
        self.name = name
        self.vocabulary = vocabulary
        self.tokens = 0
        self._ids: list[npt.NDArray[Any]] = []
        self._records: list[tuple[int, str, str, int]] = []

    def add(self, ids: Sequence[int] | npt.NDArray[Any], document_id: str, source: str = "", line: int = 0) -> None:
        """Append one document as it is to be stored, its EOS included."""
        array = np.asarray(ids)
        if not len(array) or array.min() < 0 or array.max() >= self.vocabulary.size:
            raise ValueError(f"document {document_id}: {len(array)} ids, not all of 0 to {self.vocabulary.size - 1}")
        self._ids.append(array.astype(self.vocabulary.dtype))
        self.tokens += len(array)
        self._records.append((self.tokens, document_id, source, line))

    def close(self) -> Shard:
        """Write the shard and return its manifest entry."""
        dtype = self.vocabulary.dtype
        data = memoryview(np.concatenate([np.empty(0, dtype), *self._ids])).cast("B")
        header = _header(self.tokens, len(self._records), self.vocabulary)
        starts = range(0, len(data), BLOCK_BYTES)
        blocks = [xxhash.xxh3_64_intdigest(data[start : start + BLOCK_BYTES]) for start in starts]
        hashes = np.array(blocks, "<u8").tobytes()
        footer = hashes + _SEAL.pack(xxhash.xxh3_64_intdigest(header), xxhash.xxh3_64_intdigest(hashes), _END_MAGIC)
        records = _parquet(self._records)
        whole = xxhash.xxh3_64(header)
        whole.update(data)
        whole.update(footer)
        publish(self.path / f"{self.name}.tokens", [header, data, footer])
        publish(self.path / f"{self.name}.docs.parquet", [records])
        return Shard(
            name=self.name,
            tokens=self.tokens,
            documents=len(self._records),
            bytes=len(header) + len(data) + len(footer),
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
    """Publish the data set in folder `path`, whose shards are all written."""
    content = {
        "format_version": FORMAT_VERSION,
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
    """A whole split from (id, ids as stored) in the order given; without texts, a token counts as one text byte."""
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


def publish(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is either absent (or as before) or whole, also after a crash of the machine."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _header(tokens: int, documents: int, vocabulary: Vocabulary) -> bytes:
    ids = [_NO_ID if number is None else number for number in (vocabulary.bos_id, vocabulary.eos_id)]
    fingerprint = vocabulary.fingerprint.encode()
    if len(fingerprint) > 64:
        raise ValueError(f"a tokenizer fingerprint has at most 64 characters, not {len(fingerprint)}")
    return _HEADER.pack(
        _MAGIC, FORMAT_VERSION, vocabulary.dtype.itemsize, tokens, documents, vocabulary.size, *ids, fingerprint
    ).ljust(HEADER_BYTES, b"\0")


def _file_bytes(tokens: int, dtype: np.dtype[Any]) -> int:
    data = tokens * dtype.itemsize
    return HEADER_BYTES + data + 8 * -(-data // BLOCK_BYTES) + _SEAL.size


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
