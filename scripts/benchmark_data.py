"""Measure the data path against what it is compared with, all in one run; one JSON object a line.

    python scripts/benchmark_data.py [--source FILE.jsonl.gz --tokenizer_path DIR] [--tokens 33554432] [--work_dir DIR]

    reader         order, boundaries, checks and digest, against a plain memory-mapped gather to int64
    packing        padding and cut documents of each packing
    resume, query  opening at 15,000 shards; `step` and `doc` on a store of a million rows (both stores: hard links)
    loader         our prefetch thread, a packed dataset behind one DataLoader worker, and one document a row,
                   tokenised in the worker (the published loader's way; needs --source)
    tokenise       prepare_data.py against raw encode_batch_fast in CPU time (needs --source)

Documents of the reader's part are random ids with the lengths of German web text: log-normal, median 368. Every value
is the best of some; ratio is to the line whose `what` is the reference. Needs some 300 MB in --work_dir.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, run_program


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--source", type=Path, help=".jsonl or .jsonl.gz with a field text")
    parser.add_argument("--tokenizer_path", type=Path, help="tokenizer folder for --source")
    parser.add_argument("--tokens", type=int, default=1 << 25, help="tokens of the store that is read")
    parser.add_argument("--work_dir", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    if (arguments.source is None) != (arguments.tokenizer_path is None):
        raise BadInput("--source and --tokenizer_path: give both or none")
    if arguments.source and not arguments.source.is_file():
        raise BadInput(f"--source {arguments.source}: no such file")
    from lit_gpt.bench.bench_data import measure  # brings torch

    for line in measure(arguments.tokens, arguments.source, arguments.tokenizer_path, arguments.work_dir):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(main)
