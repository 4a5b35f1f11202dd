"""A finished corpus: its manifest, its ledger, and where its documents came from. Opened by `why` and `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lit_gpt.cli import BadInput
from lit_gpt.corpus.draft import LINE_BITS
from lit_gpt.corpus.finish import FORMAT, MANIFEST
from lit_gpt.corpus.last_steps import id_hash
from lit_gpt.corpus.parts import Layout, Part, divide
from lit_gpt.files import OWN_JSON_BYTES, read_json
from lit_gpt.prepare.records import Fields, SourceFile
from lit_gpt.prepare.source_flags import TEXT_OTHERWISE


class Corpus:
    """Raises BadInput if the folder holds no finished corpus."""

    def __init__(self, folder: Path) -> None:
        if not (folder / MANIFEST).is_file():
            raise BadInput(f"{folder} holds no finished corpus (no {MANIFEST})")
        manifest = read_json(folder / MANIFEST, OWN_JSON_BYTES)
        if manifest.get("format") != FORMAT:
            raise BadInput(f"{folder / MANIFEST} is of format {manifest.get('format')}; this program reads {FORMAT}")
        self.layout = Layout(folder)
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        request = manifest["request"]
        self.sources = requested_sources(request)
        self.parts: list[Part] = divide(self.sources, request["settings"]["part_bytes"])
        self.fields = fields(request["settings"]["text_field"], request["settings"]["id_field"])

    def part_of(self, file: int) -> Part:
        return next(part for part in reversed(self.parts) if part.first_file <= file)

    def places(self, id: str) -> list[tuple[int, int]]:
        """File and line of each document with that id, or of another whose id has the same hash."""
        wanted = np.uint64(id_hash(id))
        found: list[tuple[int, int]] = []
        for part in self.parts:
            with _told(self.layout.ids(part.number)) as path:
                hashes, places = np.load(path, mmap_mode="r")
            begin, end = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
            found += [(place >> LINE_BITS, place & (1 << LINE_BITS) - 1) for place in places[begin:end].tolist()]
        return found

    def rows(self, file: int, line: int) -> list[dict[str, Any]]:
        """The ledger's rows of a document, in their order."""
        name = self.sources[file].name
        with _told(self.layout.removed(self.part_of(file).number)) as path, open(path, "rb") as raw:
            ledger = pq.ParquetFile(raw)
            columns = {ledger.schema_arrow.names[at]: at for at in range(len(ledger.schema_arrow.names))}
            groups = [
                number
                for number in range(ledger.num_row_groups)
                if _may_hold(ledger.metadata.row_group(number), columns, name, line)
            ]
            table = ledger.read_row_groups(groups, use_threads=False)
        rows: list[dict[str, Any]] = []
        for batch in table.to_batches():
            at = np.flatnonzero(np.from_dlpack(batch["line"]) == line)  # other ways import pandas, which takes 0.2 s
            rows += [row for number in at.tolist() for row in batch.slice(number, 1).to_pylist()]
        return [row for row in rows if row["source_file"] == name]


@contextmanager
def _told(path: Path) -> Iterator[Path]:
    """Raise BadInput if the file turns out to be damaged, or gone."""
    try:
        yield path
    except (OSError, ValueError, EOFError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise BadInput(
            f"{path} cannot be read ({said}): `scripts/build_corpus.py verify` says what else is damaged"
        ) from None


def _may_hold(group: Any, columns: dict[str, int], name: str, line: int) -> bool:
    """By the statistics of a row group, whether it may have rows of that line of that file."""
    files, lines = (group.column(columns[column]).statistics for column in ("source_file", "line"))
    if files is None or not files.has_min_max or lines is None or not lines.has_min_max:
        return True
    return bool(files.min <= name <= files.max and lines.min <= line <= lines.max)


def requested_sources(request: dict[str, Any]) -> list[SourceFile]:
    """The source files that a request names."""
    return [
        SourceFile(Path(path), name, size, mtime_ns, format, compression, None)
        for path, name, size, mtime_ns, format, compression in request["sources"]
    ]


def fields(text_field: str, id_field: str | None) -> Fields:
    """How the records of a corpus' sources are read: with all their fields."""
    otherwise = TEXT_OTHERWISE if text_field == "text" else ()
    return Fields(text_field, id_field or "", otherwise, others=True)
