"""One .tokens file: its format, and how it is read and verified.

    header   256 bytes: magic, version, bytes per id, tokens, documents, vocabulary size, bos, eos, fingerprint
    ids      little-endian uint16, or uint32 for a vocabulary above 65,535 ids
    footer   one xxh3 per MiB of ids, xxh3 of the header, xxh3 of the block hashes, end magic

Invariants: the header determines the file's size, so a truncated file is found without reading it; `verify` names the
block in which a bit has flipped. Files are published whole.
Costs: opening reads the header and 8 bytes; `verify` reads everything once, a MiB at a time.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

FORMAT_VERSION = 1
HEADER_BYTES = 256
"""Token ids begin here in every .tokens file."""
BLOCK_BYTES = 1 << 20
"""Token bytes that one hash of the footer covers."""
_MAGIC = b"LLMtoks\n"
_END_MAGIC = b"\nLLMend\n"
_HEADER = struct.Struct("<8sIIQQIii64s")
_SEAL = struct.Struct("<QQ8s")  # end of the footer: xxh3 of the header, xxh3 of the block hashes, end magic
_NO_ID = -1


class DamagedShard(ValueError):
    """A store's file differs from its manifest or its hashes; says which file, where in it, and what was expected."""


class Shard(NamedTuple):
    """A shard's entry in the manifest: sizes and hashes of its two files."""

    name: str
    tokens: int
    documents: int
    bytes: int
    xxh3: str
    docs_bytes: int
    docs_xxh3: str


class Vocabulary(NamedTuple):
    """What a shard records of the tokenizer that made it."""

    fingerprint: str
    size: int
    bos_id: int | None
    eos_id: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.size <= 65_535 else "<u4")


class HasVocabulary(Protocol):
    """A store, as far as ShardFile reads it."""

    @property
    def vocabulary(self) -> Vocabulary: ...


class ShardFile:
    """One open .tokens file, read with pread: threads may share it, and a file that shrinks is an error, not a crash.

    `path` is the file's folder: the store's, or that of a staged copy. Raises DamagedShard unless size and header are
    those of `shard`.
    """

    def __init__(self, path: str | os.PathLike[str], shard: Shard, store: HasVocabulary) -> None:
        self.path = Path(path) / f"{shard.name}.tokens"
        self.shard = shard
        self.dtype = store.vocabulary.dtype
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise DamagedShard(f"{self.path}: missing, and its manifest names it") from None
        try:
            self._check_frame(store.vocabulary)
        except BaseException:
            self.close()
            raise

    def expect_random_reads(self) -> None:
        """Tell the kernel not to read ahead: rows are read in random order, and read-ahead would fetch many times their
        bytes from a network file system."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

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
        """Token ids [start, stop) of the shard; raises DamagedShard if the file was truncated."""
        if not 0 <= start <= stop <= self.shard.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.path}, which holds {self.shard.tokens}")
        width = self.dtype.itemsize
        return np.frombuffer(self._pread(HEADER_BYTES + start * width, (stop - start) * width), self.dtype)

    def verify(self) -> None:
        """Check each block against the footer and the file against the manifest; DamagedShard names the first fault."""
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


def frame(tokens: npt.NDArray[Any], documents: int, vocabulary: Vocabulary) -> list[bytes | memoryview]:
    """The bytes of a .tokens file: header, ids, footer."""
    header = _header(len(tokens), documents, vocabulary)
    data = tokens.view(np.uint8).data
    starts = range(0, len(data), BLOCK_BYTES)
    blocks = [xxhash.xxh3_64_intdigest(data[start : start + BLOCK_BYTES]) for start in starts]
    hashes = np.array(blocks, "<u8").tobytes()
    seal = _SEAL.pack(xxhash.xxh3_64_intdigest(header), xxhash.xxh3_64_intdigest(hashes), _END_MAGIC)
    return [header, data, hashes + seal]


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
