"""What a run saw: which documents at which step, and whether data and datapoint log still agree.

    python scripts/datapoints.py step 1200 --run_dir out/LLaMmlein_1B [--text]   parts of documents in a step
    python scripts/datapoints.py doc ID --run_dir out/LLaMmlein_1B               steps, epochs and parts of a document
    python scripts/datapoints.py verify --run_dir out/LLaMmlein_1B               every step against its digest, the log
                                                                                 against the checkpoints' marks
    python scripts/datapoints.py diff OTHER_RUN --run_dir out/LLaMmlein_1B       first step in which two runs differ
    python scripts/datapoints.py export FILE.parquet --run_dir out/LLaMmlein_1B  everything, as a table to publish

Rows are counted from the start of the run's data (`slot` in --json).
Answers follow the lineage of the newest attempt: steps that were lost in a crash do not count.
Exit codes: 0 the answer; 1 `verify` found a contradiction, or `diff` a difference; 2 bad input.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.checkpoint.record import DamagedCheckpoint, described
from lit_gpt.cli import BadInput, Parser, run_program
from lit_gpt.data.token_store import DamagedShard
from lit_gpt.datapoints.attempts import Mark
from lit_gpt.datapoints.log import FOLDER, VERIFIED
from lit_gpt.datapoints.query import Replay, Seen, difference
from lit_gpt.datapoints.run_record import RunRecord
from lit_gpt.datapoints.tables import write_documents
from lit_gpt.datapoints.witness import Witness
from lit_gpt.files import write_json
from lit_gpt.values import expand_path

SUBJECTS = {
    "step": "a step, such as step 10",
    "doc": "the id of a document",
    "verify": "no argument",
    "diff": "the folder of another run",
    "export": "the file to write, FILE.parquet",
}
EXIT_FOUND = 1
"""`verify` found a contradiction, or `diff` a difference."""


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("query", choices=("step", "doc", "verify", "diff", "export"))
    parser.add_argument("subject", nargs="?", help="step number, document id, other run folder, or file to write")
    parser.add_argument("--run_dir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--data_dir", type=Path, nargs="+", action="extend", default=[],
                        help="where the data is, if it has moved")  # fmt: skip
    parser.add_argument("--tokenizer_path", type="path", help="tokenizer for --text (default: the run's)")
    parser.add_argument("--index_dir", type=Path, help="where to keep the document index (default: the run's folder)")
    parser.add_argument("--text", action="store_true", help="step: show the text")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args(argv)
    if (arguments.query == "verify") != (arguments.subject is None):
        raise BadInput(f"{arguments.query}: give {SUBJECTS[arguments.query]}")
    if arguments.query == "export" and Path(arguments.subject).suffix != ".parquet":
        raise BadInput(f"export {arguments.subject}: the table is Parquet, so name a file FILE.parquet")
    if arguments.query in ("diff", "export"):
        try:
            arguments.subject = expand_path(arguments.subject)
        except ValueError as error:
            raise BadInput(f"{arguments.query} {arguments.subject}: {error}") from None
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return answer(parse_arguments(argv))
    except DamagedShard as error:
        raise BadInput(f"damaged: {error}") from None


def answer(arguments: Namespace) -> int:
    if arguments.query == "diff":
        return show_difference(arguments)
    replay = Replay(arguments.run_dir, arguments.data_dir, arguments.index_dir)
    if arguments.query == "verify":
        found = contradictions_of(replay, witnesses(arguments.run_dir), as_json=arguments.json)
        keep(arguments.run_dir / FOLDER / VERIFIED, found)
        return EXIT_FOUND if found["contradictions"] else 0
    if arguments.query == "export":
        return export(replay, Path(arguments.subject))
    if arguments.query == "doc":
        return show(replay, replay.document(arguments.subject), arguments)
    if not arguments.subject.isdecimal():
        raise BadInput(f"step {arguments.subject!r}: must be a whole number from 1 on")
    return show(replay, replay.step(int(arguments.subject)), arguments)


def show(replay: Replay, parts: list[Seen], arguments: Namespace) -> int:
    texts = text_of(replay, parts, arguments.tokenizer_path) if arguments.text else [None] * len(parts)
    for seen, text in zip(parts, texts, strict=True):
        if arguments.json:
            print(json.dumps({**seen._asdict(), **({} if text is None else {"text": text})}, ensure_ascii=False))
            continue
        stop = seen.start + seen.length
        print(f"step {seen.step} row {seen.slot} rank {seen.rank} epoch {seen.epoch}", end="  ")
        print(f"{seen.document} tokens {seen.start} to {stop}" + ("" if text is None else f"\n{text}\n"))
    if not parts and not arguments.json:
        print("not seen yet")
    return 0


def text_of(replay: Replay, parts: list[Seen], tokenizer_path: str | None) -> list[str | None]:
    from lit_gpt.data.tokenizer import Tokenizer  # importing it takes longer than a query

    path = tokenizer_path or replay.record.attempts[-1].details.get("tokenizer_path")
    if not path:
        raise BadInput("--text needs a tokenizer, and the run names none: give --tokenizer_path")
    tokenizer = Tokenizer.from_folder(path)
    return [tokenizer.decode(replay.tokens(seen)) for seen in parts]


def witnesses(run_dir: Path) -> list[Witness]:
    """The marks in the run's checkpoints; a checkpoint that cannot be read is told, and has none."""
    found = []
    for path in sorted(run_dir.glob("iter-*-ckpt.pth")):
        try:
            mark = described(path).facts.get("datapoint_log")
        except DamagedCheckpoint as error:
            print(f"no witness: {error}", file=sys.stderr)
            continue
        if mark is not None:  # an imported model has none
            found.append(Witness(path.name, Mark(**mark)))
    return found


def contradictions_of(replay: Replay, marks: list[Witness], *, as_json: bool) -> dict[str, int]:
    """Print each contradiction, and a summary, which is returned."""
    found = 0
    for contradiction in replay.verify(marks):
        found += 1
        print(json.dumps({"contradiction": contradiction}) if as_json else contradiction, flush=True)
    newest = replay.record.last()
    consumed = sum(map(replay.record.consumed, replay.record.data_starts()))
    rows = consumed - sum(left_out.rows for left_out in replay.record.left_out())
    result = {"steps_to": newest.step if newest else 0, "rows": rows, "contradictions": found}
    if as_json:
        print(json.dumps(result))
    else:
        said = f"{found} contradictions up to step {result['steps_to']}, {result['rows']} rows"
        print(f"{said}; compared with the marks of {len(marks)} checkpoints")
    return result


def keep(path: Path, found: dict[str, int]) -> None:
    """Record a verification for the run's report; a folder that cannot be written does without."""
    try:
        write_json(path, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **found})
    except OSError as error:
        print(f"{path}: {error.strerror}: the report will not tell of this verification", file=sys.stderr)


def show_difference(arguments: Namespace) -> int:
    this, other = (RunRecord(Path(run) / "datapoints") for run in (arguments.run_dir, arguments.subject))
    found = difference(this, other)
    if arguments.json:
        print(json.dumps({"first_difference": found.step, "common_steps": found.common_steps}))
    elif found.step is None:
        print(f"the same rows in all {found.common_steps} steps")
    else:
        print(f"step {found.step} is the first that differs, after {found.common_steps} equal ones")
        for run, record in ((arguments.run_dir, found.this), (arguments.subject, found.other)):
            seen = f"rows {record.first_slot} on, digest {record.digest:016x}" if record else "no such step"
            print(f"  {run}: {seen}")
    return 0 if found.step is None else EXIT_FOUND


def export(replay: Replay, path: Path) -> int:
    last = write_documents(replay, path)
    print(f"{path}: every part of a document up to step {last}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_program(main)
