"""Which files a program reads: those that it is given, and those in the folders that it is given.

Invariants: every file of a folder is read, or named in the log with the reason; linked folders are followed, and a file
that several names lead to is read once, under the first. What shows that a file cannot be read shows before any work.
Costs: the first MiB of every file of records is read, and 16 ids of each are kept.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lit_gpt.cli import BadInput
from lit_gpt.prepare.document_source import read_pieces
from lit_gpt.prepare.records import Document, Fields, SourceFile, parse_piece
from lit_gpt.prepare.reject_guard import RejectGuard
from lit_gpt.prepare.streams import MAGIC, looks_like
from lit_gpt.values import near_path

FORMATS = {
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "text": (".txt",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
KINDS = f"{', '.join(itertools.chain(*FORMATS.values()))}; all but .parquet and .arrow also with {', '.join(MAGIC)}"
"""What the names of files that are read end in, for messages."""
_DATASETS_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_DATASETS_STATE = "state.json"
_SAMPLED_IDS = 16
_NAMED = 3
"""Files that one message names; of the others it tells the number."""

log = logging.getLogger(__name__)


class Unread(NamedTuple):
    path: Path
    reason: str


def open_sources(
    paths: Sequence[str], fields: Fields, *, outside: Path | None = None, max_repeated_ids: float | None = None,
    allow_damaged_files: bool = False,
) -> list[SourceFile]:  # fmt: skip
    """The files to read, in order: as given, each folder sorted by name; nothing below the folder `outside`.

    Files of a folder that are not read are named in the log. max_repeated_ids: refuse files that begin with ids of
    others and hold more than this share of all bytes. Raises BadInput if a path does not exist or is of no known kind,
    if a folder holds nothing to read, or if a file shows already that it cannot be read.
    """
    unread: list[Unread] = []
    try:
        found = [file for given in map(Path, paths) for file in _files_of(given, outside, unread)]
    except OSError as error:
        raise BadInput(f"cannot read {error.filename}: {error.strerror}") from None
    kept, heads = _checked(_once(found, unread), fields, unread, allow_damaged_files)
    beside_records = {file.folder for file in kept if file.format != "text"} - {None}
    for file in kept:
        if file.format == "text" and file.folder in beside_records:
            unread.append(Unread(file.path, "plain text beside files of records: to read it, name it as a --source"))
    kept = [file for file in kept if file.format != "text" or file.folder not in beside_records]
    _log_unread(unread)
    if not kept:
        raise BadInput(f"no file to read in {', '.join(paths)} ({unread[0].path}: {unread[0].reason})")
    if not any(file.bytes for file in kept):
        raise BadInput(f"the source is empty: {', '.join(paths)}")
    if max_repeated_ids is not None:
        _refuse_repeated_ids(kept, heads, fields, max_repeated_ids)
    return _named(kept)


def _files_of(given: Path, outside: Path | None, unread: list[Unread]) -> list[SourceFile]:
    if not given.is_dir():
        return [_given(given)]
    before = len(unread)
    files = _in_folder(given, outside, unread)
    if not files:
        reason = f" ({unread[before].path}: {unread[before].reason})" if unread[before:] else ""
        raise BadInput(f"no file to read in folder {given}{reason}. What is read: {KINDS}")
    return files


def _once(files: Sequence[SourceFile], unread: list[Unread]) -> list[SourceFile]:
    """Each file under one of its names: the first that is no link, else the first."""
    chosen: dict[tuple[int, int], SourceFile] = {}
    for file in sorted(files, key=lambda file: file.path.is_symlink()):
        status = file.path.stat()
        chosen.setdefault((status.st_dev, status.st_ino), file)
    kept = {id(file) for file in chosen.values()}
    unread += [Unread(file.path, "a file that is read under another name") for file in files if id(file) not in kept]
    return [file for file in files if id(file) in kept]


def _given(path: Path) -> SourceFile:
    if not path.exists():
        raise BadInput(f"source {path}: there is no such file or folder{near_path(path)}")
    if not path.is_file():
        raise BadInput(f"source {path} is no regular file")
    _refuse_token_store(path)
    if (kind := _kind(path)) is None:
        raise BadInput(f"source {path} is of no known kind: {KINDS}, or a folder of them")
    return _source_file(path, path.name, kind, None)


def _refuse_token_store(path: Path) -> None:
    shard = [path.with_name(path.name.partition(".")[0] + suffix) for suffix in (".tokens", ".docs.parquet")]
    if path in shard and all(file.is_file() for file in shard):
        raise BadInput(f"source {path.parent} is a token store: tokenised already, as --train_data_dir takes it")


def given_file(path: Path) -> SourceFile | None:
    """A file to read, by its name; None if the name is of no known kind. The file need not be there."""
    kind = _kind(path)
    if kind is None:
        return None
    if not path.is_file():
        return SourceFile(path, path.name, 0, 0, *kind, None)
    return _source_file(path, path.name, kind, None)


def _kind(path: Path) -> tuple[str, str] | None:
    """Format and compression by the name; None for other names."""
    name = path.name.lower()
    compression = next((suffix for suffix in MAGIC if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    for format, suffixes in FORMATS.items():
        if name.endswith(suffixes):
            return None if compression and format in ("parquet", "arrow") else (format, compression)
    return None


def _source_file(path: Path, name: str, kind: tuple[str, str], folder: Path | None) -> SourceFile:
    status = path.stat()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns, *kind, folder)


def _in_folder(root: Path, outside: Path | None, unread: list[Unread]) -> list[SourceFile]:
    """The files below `root` whose names say that they are read; the others go to `unread`."""
    files = []
    for path in sorted(_walk(root, outside, unread)):
        kind, reason = _kind(path), _reason_to_leave(path)
        if reason or kind is None:
            unread.append(Unread(path, reason or "of no kind that is read"))
        elif kind[0] == "text" and not path.stat().st_size:
            unread.append(Unread(path, "empty"))
        else:
            _refuse_token_store(path)
            files.append(_source_file(path, path.relative_to(root).as_posix(), kind, root))
    return files


def _walk(root: Path, outside: Path | None, unread: list[Unread]) -> Iterator[Path]:
    """Every file below `root`, also through links to folders, which come last; each folder once."""
    waiting = deque([root])
    known = set()
    while waiting:
        folder = waiting.popleft()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in known:
            unread.append(Unread(folder, "a folder that is read under another name"))
            continue
        known.add((status.st_dev, status.st_ino))
        if outside is not None and outside.resolve() in (resolved := folder.resolve(), *resolved.parents):
            unread.append(Unread(folder, "the destination"))
            continue
        for path in sorted(folder.iterdir(), reverse=True):
            if path.name.startswith(".") or not path.is_dir():
                yield path
            elif path.is_symlink():
                waiting.append(path)
            else:
                waiting.appendleft(path)


def _reason_to_leave(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if not path.exists():
        return "a link that leads nowhere"
    if not stat.S_ISREG(path.stat().st_mode):
        return "no regular file"
    if path.name in _DATASETS_FILES:
        return "metadata of `datasets`"
    if path.suffix.lower() == ".arrow":
        if path.name.startswith("cache-"):
            return "a cache of `datasets`"
        if (named := _named_by_datasets(path.parent)) is not None and path.name not in named:
            return f"{_DATASETS_STATE} beside it does not name it"
    return None


def _named_by_datasets(folder: Path) -> list[str] | None:
    """The files that make up a folder of save_to_disk; None if it is none. Raises BadInput if one is missing."""
    try:
        state = json.loads((folder / _DATASETS_STATE).read_bytes())
        names = [str(file["filename"]) for file in state["_data_files"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInput(f"{folder / _DATASETS_STATE} cannot be read ({error})") from None
    for name in names:
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name} is missing, and {_DATASETS_STATE} beside it names it")
    return names


def _checked(
    files: list[SourceFile], fields: Fields, unread: list[Unread], allow_damaged_files: bool
) -> tuple[list[SourceFile], dict[Path, list[str]]]:
    """The files that can be read, and the first ids of each; BadInput names those that cannot."""
    kept, heads, bad = [], {}, []
    for file in files:
        try:
            heads[file.path] = _first_ids(file, fields, allow_damaged_files)
        except _OtherContent as error:
            unread.append(Unread(file.path, str(error)))
            continue
        except BadInput as error:
            bad.append(str(error))
        except OSError as error:
            bad.append(f"cannot read {file.path}: {error.strerror or error}")
        kept.append(file)
    if bad:
        more = f"; and {len(bad) - _NAMED} more files" if len(bad) > _NAMED else ""
        raise BadInput("; ".join(bad[:_NAMED]) + more)
    return kept, heads


class _OtherContent(Exception):
    """A file of a folder holds something else than documents, by what its kind allows."""


def _first_ids(file: SourceFile, fields: Fields, allow_damaged_files: bool) -> list[str]:
    with open(file.path, "rb") as raw:
        head = raw.read(64)
    _check_beginning(file, head)
    if file.format == "text" or (not file.bytes and file.format != "parquet"):
        return []
    try:
        piece = next(read_pieces(file, 0, fields), None)
    except BadInput as error:
        if file.folder and file.format == "csv" and "has no column" in str(error):
            raise _OtherContent(f"no column {fields.text!r}") from None
        raise
    if piece is None:
        return []
    if damage := piece.damage:
        if damage.kind == "cut short" and damage.line == 1:
            raise BadInput(f"{file.path}: nothing of it can be read ({damage.detail})")
        RejectGuard(0, allow_damaged_files).admit(file, piece)
    records = list(itertools.islice(parse_piece(piece, fields), _SAMPLED_IDS))
    if file.folder and file.format == "json" and not any(isinstance(record, Document) for record in records):
        raise _OtherContent(f"its first records have no text in a field {fields.text!r}")
    return [record.id for record in records if isinstance(record, Document) and record.id]


def _check_beginning(file: SourceFile, head: bytes) -> None:
    if not head:
        return
    if file.compression:
        if not head.startswith(MAGIC[file.compression]):
            found = looks_like(head) or f"it begins with {head[:12]!r}"
            raise BadInput(f"{file.path} is not compressed as its name says: {found}")
    elif file.format not in ("parquet", "arrow") and (what := looks_like(head)):
        if file.format == "text" and head.isascii() and b"\0" not in head and "LFS" not in what:
            return  # a text may begin with "PAR1" too
        raise BadInput(f"{file.path} is not text: {what}")


def _refuse_repeated_ids(
    files: Sequence[SourceFile], heads: dict[Path, list[str]], fields: Fields, most: float
) -> None:
    """Raise BadInput if the first ids of files occur before, in files that hold more than `most` of all bytes."""
    seen: dict[str, SourceFile] = {}
    repeating: list[tuple[SourceFile, str, SourceFile]] = []
    for file in files:
        again = []
        for id in heads.get(file.path, []):
            if id in seen:
                again.append(id)
            seen.setdefault(id, file)
        if 2 * len(again) > len(heads.get(file.path, [])):
            repeating.append((file, again[0], seen[again[0]]))
    if sum(file.bytes for file, _, _ in repeating) > most * sum(file.bytes for file in files):
        file, id, first = repeating[0]
        where = "itself" if first is file else str(first.path)
        raise BadInput(
            f"ids repeat in {len(repeating)} of {len(files)} files: {file.path} has id {id}, as has {where}; an id "
            f"must belong to one document. --id_field (now {fields.id!r}) names another field; --id_field '' takes "
            "file and line instead; a higher --max_reject_fraction rejects the documents whose id occurs before"
        )


def _named(files: list[SourceFile]) -> list[SourceFile]:
    """The files with names that differ: the paths as given, where the names inside the folders do not."""
    if len({file.name for file in files}) < len(files):
        files = [file._replace(name=file.path.as_posix()) for file in files]
    return [file._replace(name=os.fsencode(file.name).decode("utf-8", "backslashreplace")) for file in files]


def _log_unread(unread: Sequence[Unread]) -> None:
    by_reason: dict[str, list[Path]] = {}
    for path, reason in unread:
        by_reason.setdefault(reason, []).append(path)
    for reason, paths in by_reason.items():
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        log.warning("not read: %s%s (%s)", ", ".join(map(str, paths[:_NAMED])), more, reason)
