"""The bytes of a file, decompressed, block by block, with what ended them early.

Invariants: every stream of a .gz, .zst, .bz2 or .xz file is read, and nothing after one is passed over as padding
unless it is.
Costs: memory for a block and the window of the compression, at most WINDOW_BYTES; a core does 0.2-0.4 GB/s of gzip.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from lit_gpt.prepare.records import PIECE_BYTES, SourceFile

MAGIC: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\0",),
}
"""How the files of each compression begin (zstd: a frame, or one that decoders skip)."""
WINDOW_BYTES = 128 << 20
"""zstd allows as much unless asked for more."""
_OTHERS = (
    (b"PAR1", "Parquet"),
    (b"PARE", "encrypted Parquet"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\xff\xfe", "UTF-16 text; `iconv -f UTF-16 -t UTF-8` converts it"),
    (b"\xfe\xff", "UTF-16 text; `iconv -f UTF-16 -t UTF-8` converts it"),
    (b"version https://git-lfs", "a pointer of Git LFS; `git lfs pull` fetches the file"),
    (b"<!DOCTYPE html", "a web page"),
    (b"<html", "a web page"),
    (b"ARROW1", "Arrow"),
    (b"Salted__", "encrypted by openssl"),
    (b"-----BEGIN PGP", "encrypted by PGP"),
)
_READ_BYTES = 1 << 16  # small, because the read that meets damage in an archive yields nothing
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


class Stream(NamedTuple):
    raw: BinaryIO
    read: Callable[[int], bytes]


def looks_like(head: bytes) -> str | None:
    """What a file that begins so is, if that is neither text nor JSON."""
    for compression, beginnings in MAGIC.items():
        if head.startswith(beginnings):
            return f"compressed; its name must end in {compression}"
    if what := next((what for beginning, what in _OTHERS if head.startswith(beginning)), None):
        return what
    odd, even = head[1::2], head[::2]  # of UTF-16 without a mark at its beginning
    for order, high, low in (("LE", odd, even), ("BE", even, odd)):
        if len(high) > 1 and low and 2 * high.count(0) > len(high) and not low.count(0):
            return f"UTF-16 text; `iconv -f UTF-16{order} -t UTF-8` converts it"
    return None


@contextmanager
def opened(source: SourceFile) -> Iterator[Stream]:
    """The bytes of `source`, decompressed."""
    with open(source.path, "rb") as raw:
        if not source.bytes or not source.compression:
            yield Stream(raw, raw.read)
        elif source.compression == ".gz":
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield Stream(raw, unzipped.read1)
        elif source.compression == ".zst":
            with pa.CompressedInputStream(raw, "zstd") as unzipped:
                yield Stream(raw, unzipped.read)
        elif source.compression == ".bz2":
            yield Stream(raw, _Streams(raw, bz2.BZ2Decompressor).read)
        else:
            yield Stream(raw, _Streams(raw, lambda: lzma.LZMADecompressor(memlimit=WINDOW_BYTES)).read)


class _Streams:
    """The streams of a .bz2 or .xz file, one after the other. bz2.open and lzma.open end where a later one is bad."""

    def __init__(self, raw: BinaryIO, make: Callable[[], Any]) -> None:
        self._raw, self._make = raw, make
        self._stream = make()

    def read(self, size: int) -> bytes:
        while True:
            stream = self._stream
            if stream.eof:
                data = stream.unused_data.lstrip(b"\0") or self._raw.read(_READ_BYTES).lstrip(b"\0")
                if not data:
                    if self._raw.read(1):
                        self._raw.seek(-1, 1)
                        continue
                    return b""
                self._stream = stream = self._make()
            elif stream.needs_input:
                data = self._raw.read(_READ_BYTES)
                if not data:
                    raise EOFError("the file ended before the end-of-stream marker was reached")
            else:
                data = b""
            if part := stream.decompress(data, size):
                return bytes(part)


def blocks(stream: Stream) -> Iterator[tuple[bytes, str]]:
    """The stream in blocks of exactly PIECE_BYTES, whatever a read returns, with what damage ended the last one."""
    while True:
        parts: list[bytes] = []
        size, damage = 0, ""
        try:
            while size < PIECE_BYTES and (part := stream.read(min(_READ_BYTES, PIECE_BYTES - size))):
                parts.append(part)
                size += len(part)
        except _DAMAGE as error:
            damage = str(error)
        except OSError as error:
            raise_if_disk(error)
            damage = str(error)
        yield b"".join(parts), damage
        if size < PIECE_BYTES:
            return


def raise_if_disk(error: Exception) -> None:
    """Raise an error of the disk; for one of the archive, the decoders set no errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
