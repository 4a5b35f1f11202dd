"""Measure the data path beside other ways to do the same; one JSON object a line.

    python scripts/benchmark_data.py [--source FILE.jsonl.gz --tokenizer_path DIR] [--tokens 33554432] [--work_dir DIR]

    reader         our rows (order, segments, checks, digest), beside a plain memory-mapped gather to int64
    packing        share of padding and of cut documents, of each packing
    resume, query  opening a store of 15,000 shards; `step` and `doc` on a million rows (both stores: hard links)
    loader         our prefetch thread, beside a packed dataset in one DataLoader worker, and beside a worker that
                   tokenises one document a row (the published loader's way; needs --source)
    tokenise       CPU time of prepare_data.py, beside encode_batch_fast alone (needs --source)

The documents are random tokens with the lengths of German web text: log-normal, median 368. Every value is the best of
some repetitions; `ratio` is to the line whose `what` is `reference`. Needs about 300 MB in --work_dir.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, run_program, say_loading


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
    say_loading("data path", "PyTorch")
    from lit_gpt.bench.bench_data import measure  # imports torch, which --help need not wait for

    for line in measure(arguments.tokens, arguments.source, arguments.tokenizer_path, arguments.work_dir):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(main)
