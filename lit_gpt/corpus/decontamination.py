"""The stage decontaminate: documents that share an n-gram of words with a text of an evaluation are removed.

Words are runs of letters and digits, without regard to case, of the NFC text. Compared are 64-bit hashes.
Costs: 8 bytes an n-gram of the evaluations; a document is searched at some 15 MB/s a core.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
import yaml
from datatrove.pipeline.base import PipelineStep

from lit_gpt.cli import BadInput
from lit_gpt.corpus.draft import Draft, in_batches
from lit_gpt.corpus.measures import Batch
from lit_gpt.corpus.task import Task
from lit_gpt.files import publishing
from lit_gpt.prepare.document_source import read_pieces
from lit_gpt.prepare.records import Fields, Reject, SourceFile
from lit_gpt.prepare.source_files import KINDS, given_file
from lit_gpt.values import near_path

STAGE = "decontaminate"
LEAST = 8
"""Words of the shortest text that is looked for."""
_TASK_FILES = (".yaml", ".yml")
_TASK_CODE = ("", ".md", ".py", ".pyc")
"""Of other files in the folder of a task."""
_NAME = "evaluations.npz"


class EvaluationText(NamedTuple):
    name: str
    """File, and for a record its number and field."""
    text: str


class Ngrams(NamedTuple):
    """The n-grams of all evaluation texts."""

    hashes: npt.NDArray[np.uint64]
    """Sorted."""
    texts: npt.NDArray[np.int32]
    """For each, the number of the first text that has it."""
    names: list[str]
    lengths: list[int]
    """Words of the n-grams that there are."""

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.hashes.tobytes() + json.dumps(self.names).encode())


def make_ngrams(paths: Sequence[str], words: int) -> Ngrams:
    """The n-grams of the texts in files and folders. Raises BadInput if a path cannot be read or none has a text."""
    texts = list(itertools.chain.from_iterable(map(_texts_of, _files(paths))))
    found: dict[int, int] = {}
    lengths = set()
    for number, one in enumerate(texts):
        hashes = _Words([one.text])
        length = min(words, hashes.count)
        if length >= LEAST:
            lengths.add(length)
            for hash in hashes.ngrams(length)[1].tolist():
                found.setdefault(hash, number)
    if not found:
        raise BadInput(f"--evaluation_texts {' '.join(paths)}: no text there has {LEAST} words")
    order = sorted(found)
    numbers = np.array([found[hash] for hash in order], np.int32)
    return Ngrams(np.array(order, np.uint64), numbers, [one.name for one in texts], sorted(lengths))


def write_ngrams(folder: Path, ngrams: Ngrams) -> None:
    with publishing(folder / _NAME) as partial, open(partial, "wb") as file:
        names, lengths = np.array(ngrams.names), np.array(ngrams.lengths)
        np.savez(file, hashes=ngrams.hashes, texts=ngrams.texts, names=names, lengths=lengths)


def read_ngrams(folder: Path) -> Ngrams:
    with np.load(folder / _NAME) as arrays:
        return Ngrams(arrays["hashes"], arrays["texts"], arrays["names"].tolist(), arrays["lengths"].tolist())


class DecontaminateStep(PipelineStep):
    name = STAGE
    type = "filter"

    def __init__(self, folder: Path, task: Task) -> None:
        super().__init__()
        self._folder, self._task = folder, task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        ngrams = read_ngrams(self._folder)
        for drafts in in_batches(data):
            yield from self._clean(drafts, ngrams)

    def _clean(self, drafts: list[Draft], ngrams: Ngrams) -> Iterator[Draft]:
        words = _Words([draft.text for draft in drafts])
        hits = np.zeros(len(drafts), np.int64)
        first = np.full(len(drafts), -1)
        for length in ngrams.lengths:
            document, hashes = words.ngrams(length)
            at = np.minimum(np.searchsorted(ngrams.hashes, hashes), len(ngrams.hashes) - 1)
            hit = np.flatnonzero(ngrams.hashes[at] == hashes)
            hits += np.bincount(document[hit], minlength=len(drafts))
            for place in hit[::-1].tolist():
                first[document[place]] = ngrams.texts[at[place]]
        self._task.measure("evaluation_ngrams", hits, 60)
        for draft, count, number in zip(drafts, hits.tolist(), first.tolist(), strict=True):
            if count:
                name = ngrams.names[number]
                self._task.remove(draft, STAGE, "evaluation_ngram", count, 0, duplicate_of_document=name)
            else:
                yield draft


class _Words(Batch):
    """Texts as runs of letters and digits."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__([unicodedata.normalize("NFC", text).casefold() for text in texts], only_letters=True)
        self.count = len(self._starts)

    def ngrams(self, words: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Number of the text, and hash, of each n-gram."""
        positions, hashes = self._ngrams(words)
        return self._document[positions], hashes


# Texts


def _files(paths: Sequence[str]) -> Iterator[Path]:
    for given in map(Path, paths):
        if given.is_dir():
            found = sorted(path for path in given.rglob("*") if path.is_file() and not path.name.startswith("."))
            yield from (path for path in found if path.suffix not in _TASK_CODE)
        elif given.is_file():
            yield given
        else:
            raise BadInput(f"--evaluation_texts {given}: there is no such file or folder{near_path(given)}")


def _texts_of(path: Path) -> Iterator[EvaluationText]:
    if path.suffix.lower() in _TASK_FILES:
        yield from _task_texts(path)
        return
    if (source := given_file(path)) is None:
        raise BadInput(f"--evaluation_texts {path} is of no known kind: {KINDS}, {', '.join(_TASK_FILES)}")
    for number, record in enumerate(_records(source), 1):
        for field, text in _strings(record):
            yield EvaluationText(f"{path.name}:{number}{field}", text)


def _task_texts(path: Path) -> Iterator[EvaluationText]:
    """The texts of the files that an lm-eval task names as its data, from its folder."""
    data = _task(path).get("dataset_kwargs")
    named = [path.parent / name for _, name in _strings(data.get("data_files") if isinstance(data, dict) else None)]
    for file in named:
        if not file.is_file():
            raise BadInput(f"--evaluation_texts {path} names {file}, which is not there")
        yield from _texts_of(file)
    if not named:
        raise BadInput(
            f"--evaluation_texts {path} names no file of texts (dataset_kwargs: data_files): give the files themselves"
        )


def _task(path: Path, *, includes: int = 8) -> dict[str, Any]:
    """What an lm-eval task says, and the file that it includes."""
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8").replace("!function", ""))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"--evaluation_texts {path}: this is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(task, dict) or not includes or not isinstance(task.get("include"), str):
        return task if isinstance(task, dict) else {}
    return {**_task(path.parent / task["include"], includes=includes - 1), **task}


def _records(source: SourceFile) -> Iterator[Any]:
    if source.format in ("parquet", "arrow"):
        import pyarrow.dataset as ds

        for batch in ds.dataset(source.path, format=source.format).to_batches(batch_size=1024):
            yield from batch.to_pylist()
        return
    fields = Fields(others=True)
    for piece in read_pieces(source, 0, fields):
        if isinstance(piece.payload, bytes):
            yield from (json.loads(line) for line in piece.payload.splitlines() if line.strip())
        else:
            for row in piece.payload:
                if isinstance(row, Reject):
                    raise BadInput(f"--evaluation_texts {source.path} line {row.line}: {row.kind} ({row.detail})")
                yield (row.text or b"").decode()


def _strings(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a record, with the way to it."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{field}.{name}" if field else f" {name}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, field)
