"""What knows how the datapoint log began: each checkpoint's mark, and each mark that an attempt continued from.

A mark holds the length and the hash of the log's beginning. So a log that lost its head, its tail or a part between,
that was changed, or that is another run's, contradicts the marks. Cost: the log is read once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from lit_gpt.datapoints.attempts import Attempt, Mark
from lit_gpt.datapoints.log import STEPS_FILE

_CHUNK_BYTES = 1 << 20


class Witness(NamedTuple):
    """Something that holds a mark."""

    name: str
    mark: Mark


def contradictions(folder: Path, attempts: Sequence[Attempt], witnesses: Iterable[Witness]) -> Iterator[str]:
    """One line for the first witness whose mark the log in `folder` contradicts, and one if an attempt begins after its
    end.

    A mark in another run's log, from which an attempt began, says nothing about this log.
    """
    elsewhere = {attempt.parent for attempt in attempts if not attempt.parent_here}
    known = [witness for witness in witnesses if witness.mark not in elsewhere]
    known += [
        Witness(f"attempt {attempt.attempt}", attempt.parent)
        for attempt in attempts
        if attempt.parent and attempt.parent_here
    ]
    path = folder / STEPS_FILE
    size = path.stat().st_size
    known.sort(key=lambda witness: witness.mark.bytes)
    hashes = _hashes(path, {witness.mark.bytes for witness in known})
    wrong = [witness for witness in known if hashes.get(witness.mark.bytes) != witness.mark.xxh3]
    if wrong:
        name, mark = wrong[0]
        others = f" ({len(wrong) - 1} later witnesses say so too)" if len(wrong) > 1 else ""
        if size < mark.bytes:
            yield f"{path} is cut: it has {size} bytes, and had {mark.bytes} at step {mark.step}, says {name}{others}"
        else:
            yield (
                f"{path} does not begin with the {mark.bytes} bytes that it had at step {mark.step}, says {name}: "
                f"cut, changed, or another run's{others}"
            )
    elif size < attempts[-1].begin_bytes:
        yield f"{path} is cut: it has {size} bytes, and had {attempts[-1].begin_bytes} when the last attempt began"


def _hashes(path: Path, lengths: Collection[int]) -> dict[int, str]:
    """xxh3 of the file's first bytes, for each length that the file has."""
    running, at, found = xxhash.xxh3_64(), 0, dict[int, str]()
    with path.open("rb") as file:
        for length in sorted(lengths):
            while at < length and (chunk := file.read(min(_CHUNK_BYTES, length - at))):
                running.update(chunk)
                at += len(chunk)
            if at == length:
                found[length] = running.hexdigest()
    return found
