"""Readers of text: lines of JSON, JSON arrays and objects, one document a file.

Costs: memory for a piece, or for the longest record up to MAX_DOCUMENT_BYTES.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator

from lit_gpt.prepare.records import MAX_DOCUMENT_BYTES, PIECE_BYTES, Cutter, Piece, Reject, Row, packed
from lit_gpt.prepare.streams import Stream, blocks

BOM = b"\xef\xbb\xbf"
_TOO_LONG = ("too long", f"over {MAX_DOCUMENT_BYTES} bytes")
_PROBED_LINES = 8
_JSON_TOKEN = re.compile(rb'["{}\[\],]')
_STRING_REST = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


def text_pieces(stream: Stream, file: int) -> Iterator[Piece]:
    """The file as one document."""
    held, damage = bytearray(), ""
    for block, ended in blocks(stream):
        damage = ended
        if len(held) <= MAX_DOCUMENT_BYTES:
            held += block
    text = bytes(held.removeprefix(BOM))
    record = Reject(1, "cut short", damage) if damage else Row(1, text, None)
    yield from packed(Cutter(file, stream.raw.tell), [record])


def line_pieces(stream: Stream, file: int) -> Iterator[Piece]:
    """The lines of the file."""
    return _cut_lines(Cutter(file, stream.raw.tell), blocks(stream))


def json_pieces(stream: Stream, file: int) -> Iterator[Piece]:
    """The elements of a JSON array, the objects of a file of objects, or its lines if it holds an object a line."""
    cutter, ahead = Cutter(file, stream.raw.tell), blocks(stream)
    head, damage = next(ahead)
    head = head.removeprefix(BOM)
    rest = itertools.chain([(head, damage)], ahead)
    if _holds_lines(head):
        return _cut_lines(cutter, rest)
    return _cut_elements(cutter, rest, array=head.lstrip().startswith(b"["))


def _holds_lines(head: bytes) -> bool:
    """Whether one of the first lines is a JSON object; a line of an object over several lines is none."""
    for line in head.split(b"\n", _PROBED_LINES)[:_PROBED_LINES]:
        if line.startswith(b"{"):
            try:
                json.loads(line)
            except (ValueError, RecursionError):
                continue
            return True
    return False


def _cut_lines(cutter: Cutter, parts: Iterable[tuple[bytes, str]]) -> Iterator[Piece]:
    kept = bytearray()
    line, skipping = 1, False

    def reject(kind: str, detail: str) -> Piece:
        nonlocal line
        line += 1
        return cutter.piece(line - 1, [Reject(line - 1, kind, detail)])

    for block, damage in parts:
        kept += block
        if skipping:
            end = kept.find(b"\n") + 1
            del kept[: end or len(kept)]
            if end:
                yield reject(*_TOO_LONG)
                skipping = False
        if end := kept.rfind(b"\n") + 1:
            yield cutter.piece(line, bytes(kept[:end]))
            line += kept.count(b"\n", 0, end)
            del kept[:end]
        if len(kept) > MAX_DOCUMENT_BYTES:
            kept.clear()
            skipping = True
        if damage:  # costs the line in which it is, complete or not
            yield reject("cut short", damage)
            return
    if skipping:
        yield reject(*_TOO_LONG)
    elif kept:
        yield cutter.piece(line, bytes(kept))


def _cut_elements(cutter: Cutter, parts: Iterable[tuple[bytes, str]], *, array: bool) -> Iterator[Piece]:
    """Pieces of an element a line: the number of an element is its line."""
    held: list[bytes] = []
    number, size = 1, 0

    def flushed() -> Iterator[Piece]:
        nonlocal number, size
        if held:
            yield cutter.piece(number, b"\n".join(held))
            number, size = number + len(held), 0
            held.clear()

    for element in _elements(parts, array=array):
        if isinstance(element, bytes):
            held.append(element.replace(b"\n", b"\r"))  # which JSON allows in the same places
            size += len(element)
            if size >= PIECE_BYTES:
                yield from flushed()
        else:
            yield from flushed()
            yield cutter.piece(number, [Reject(number, *element)])
            number += 1
    yield from flushed()


def _elements(parts: Iterable[tuple[bytes, str]], *, array: bool) -> Iterator[bytes | tuple[str, str]]:
    """Each element, not parsed (of an array: what is between its commas; else: each object). A pair is a reject.

    Only strings and brackets are looked at, so that an element that is no JSON costs no other, unless its brackets or
    quotes do not match.
    """
    kept = bytearray()
    depth = at = begin = 0  # `at` is where to look on, `begin` where the element begins
    skipping = in_string = False
    damage = ""
    for block, ended in parts:
        damage = ended
        kept += block
        while at < len(kept):
            if in_string:
                at = _STRING_REST.match(kept, at).end()  # type: ignore[union-attr]  # it matches everywhere
                if at == len(kept) or kept[at] != ord('"'):  # or the last byte is a backslash
                    break
                in_string, at = False, at + 1
            if (token := _JSON_TOKEN.search(kept, at)) is None:
                at = len(kept)
                break
            mark, at = token[0], token.end()
            end = -1
            if mark == b'"':
                in_string = True
            elif mark in (b"{", b"["):
                depth += 1
                if array and depth == 1:
                    if junk := bytes(kept[begin : token.start()]).strip():
                        yield junk
                    begin = at
            elif mark in (b"}", b"]"):
                depth = max(0, depth - 1)
                if not depth:
                    end = token.start() if array else at
            elif array and depth == 1:
                end = token.start()
            if end >= 0:
                if skipping:
                    yield _TOO_LONG
                elif element := bytes(kept[begin:end]).strip():
                    yield element
                skipping, begin = False, at
        if skipping or at - begin > MAX_DOCUMENT_BYTES:
            skipping, begin = True, at
        del kept[:begin]
        at, begin = at - begin, 0
    if damage:
        yield "cut short", damage
    elif depth or in_string:
        yield "cut short", "the file ends in the middle of a value"
    elif rest := bytes(kept).strip():
        yield rest
