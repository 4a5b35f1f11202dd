"""Tokenise documents into a token store: DIR/train and DIR/val, shuffled, split, hashed.

Reads JSON, CSV, text, Parquet and Arrow files, and folders of them (docs/data.md). After a kill at any moment, the same
command continues. The number of workers does not change the bytes. DIR/rejects.jsonl lists the rejected lines;
DIR/summary.json and DIR/lengths.png hold counts and lengths. `prepare_data.py verify DIR` checks a
store against its hashes.

Example: python scripts/prepare_data.py --source corpus/ --tokenizer_path tokenizer --destination_path data --workers 16
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import Parser, checkout_path, command_line, run_program
from lit_gpt.data.token_store import MANIFEST, DamagedShard, ShardFile, TokenStore, document_ends
from lit_gpt.files import publishing, sweep
from lit_gpt.prepare.build_request import BuildSettings
from lit_gpt.prepare.source_flags import add_source_flags, fields_of
from lit_gpt.prepare.store_builder import BuildProgress, Report, build
from lit_gpt.prepare.worker_pool import usable_cores

LOG_INTERVAL_S = 10
EXIT_DAMAGED = 1
HISTOGRAM = "lengths.png"
LITTLE_TOKENS = 100_000_000
COLORS = {"train": "#4477AA", "val": "#CC6677"}

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["verify"]:
        return verify(arguments[1:])
    settings = parse_arguments(arguments)
    with shown_progress() as report:
        summary = build(settings, report)
    destination = Path(settings.destination_path)
    draw_lengths(summary, destination / HISTOGRAM)
    print(describe(summary, destination))
    if "train" in summary["splits"]:
        log.info("next: %s", next_command(summary, settings))
    return None


def next_command(summary: dict[str, Any], settings: BuildSettings) -> str:
    """That trains on the store: a small model, where there is little data."""
    recipe = "debug" if summary["splits"]["train"]["tokens"] < LITTLE_TOKENS else "LLaMmlein_120M"
    words = ["--config", checkout_path(f"pretrain/configs/{recipe}.yaml")]
    for split in sorted(summary["splits"]):
        words += [f"--{split}_data_dir", str(Path(settings.destination_path) / split)]
    return command_line("pretrain/tinyllama_fabric.py", *words, "--tokenizer_path", settings.tokenizer_path)


def parse_arguments(argv: Sequence[str]) -> BuildSettings:
    default = BuildSettings(source=(), tokenizer_path="", destination_path="")
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", type="path", nargs="+", action="extend", required=True, help="files or folders of documents")
    add("--tokenizer_path", type="path", required=True, help="tokenizer folder")
    add("--destination_path", type="path", required=True, help="folder to write")
    add("--val_fraction", type=float, default=default.val_fraction, help="share of texts for val/ (%(default)s)")
    add("--workers", type=int, default=usable_cores(),
        help="processes (%(default)s, the cores that this process may use)")  # fmt: skip
    add("--shard_tokens", type=int, default=default.shard_tokens, help="tokens of a shard (%(default)s)")
    add("--keep_order", action="store_true", help="do not shuffle the documents")
    add("--seed", type=int, default=default.seed, help="key of the shuffle and of the split (%(default)s)")
    add("--add_bos", action="store_true", help="begin each document with BOS")
    add("--run_bytes", type=int, default=default.run_bytes,
        help="bytes of tokens that a worker holds in memory, and loses if it is killed (%(default)s)")  # fmt: skip
    add_source_flags(parser)
    arguments = parser.parse_args(argv)
    fields = fields_of(arguments)
    values = {name: value for name, value in vars(arguments).items() if name not in ("text_field", "id_field")}
    return BuildSettings(fields=fields, **{**values, "source": tuple(arguments.source)})


class Meter:
    """Speed and time left of each stage; work of earlier attempts does not count."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, BuildProgress]] = {}

    def line(self, progress: BuildProgress) -> str:
        begin_s, begin = self._first.setdefault(progress.stage, (time.monotonic(), progress))
        spent_s = time.monotonic() - begin_s
        speed = (progress.tokens - begin.tokens) / spent_s if spent_s else 0
        left_s = spent_s * (progress.total - progress.done) / max(progress.done - begin.done, 1)
        line = f"{progress.tokens / 1e6:,.1f} M tokens, {speed:,.0f} tokens/s, {timedelta(seconds=int(left_s))} left"
        return line + (f", {progress.rejects} lines rejected" if progress.rejects else "")


@contextmanager
def shown_progress() -> Iterator[Report]:
    """Show progress: a bar on a terminal, elsewhere a log line every LOG_INTERVAL_S."""
    meter = Meter()
    if not sys.stderr.isatty():
        yield functools.partial(log_progress, meter, {})
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[line]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def draw(progress: BuildProgress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.total, line="")
            bar.update(tasks[progress.stage], completed=progress.done, line=meter.line(progress))

        yield draw


def log_progress(meter: Meter, last_s: dict[str, float], progress: BuildProgress) -> None:
    line = meter.line(progress)
    now_s = time.monotonic()
    if progress.done == progress.total or now_s - last_s.setdefault(progress.stage, now_s) >= LOG_INTERVAL_S:
        last_s[progress.stage] = now_s
        log.info("%s: %.0f %%, %s", progress.stage, 100 * progress.done / progress.total, line)


def describe(summary: dict[str, Any], destination: Path) -> str:
    """The summary in a few lines."""
    ledger = summary["ledger"]
    rejects = ", ".join(f"{count} {kind}" for kind, count in ledger["rejects"].items()) or "none"
    lines = [f"{ledger['lines']:,} lines in, {ledger['documents']:,} documents; rejected: {rejects}"]
    for split in sorted(summary["splits"]):
        part = summary["splits"][split]
        length = part["document_tokens"]
        lines.append(
            f"{destination / split}: {part['documents']:,} documents, {part['tokens']:,} tokens in {part['shards']} "
            f"shard{'s' * (part['shards'] > 1)}, {part['bytes_per_token']:.2f} bytes of text a token; "
            f"document length median {length['median']}, mean {length['mean']}, 99 % up to {length['p99']}, "
            f"longest {length['max']} tokens"
        )
    return "\n".join(lines)


def draw_lengths(summary: dict[str, Any], path: Path) -> None:
    """Draw the histogram of document lengths."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for split in sorted(summary["splits"]):
        part = summary["splits"][split]
        bins = part["document_tokens"]["histogram"]
        low, high, counts = zip(*bins, strict=True)
        label = f"{split}: {part['documents']:,} documents, {part['tokens']:,} tokens"
        axes.stairs(counts, [*low, high[-1]], fill=True, alpha=0.85, color=COLORS[split], label=label)
        axes.axvline(part["document_tokens"]["median"], color=COLORS[split], linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("tokens in a document, end of document included")
    axes.set_ylabel("documents")
    axes.set_title("Document lengths (dashed: median)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    sweep(path.parent, path.name)
    with publishing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def verify(argv: Sequence[str]) -> int:
    """Check all files of a store, or of the splits in a folder, against their hashes; returns the exit code."""
    parser = Parser("Check a token store against its hashes; names each damaged shard and block.")
    parser.prog += " verify"
    parser.add_argument("folder", type=Path, help="a split's folder, or the folder of train/ and val/")
    folder = parser.parse_args(argv).folder
    splits = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}")) or [folder]
    damaged = 0
    for split in splits:
        store = TokenStore.open(split)
        for shard in store.shards:
            try:
                with ShardFile(store.path, shard, store) as file:
                    file.verify()
                document_ends(store, shard)
            except DamagedShard as error:
                damaged += 1
                print(f"damaged: {error}")
        print(f"{split}: {len(store.shards)} shards, {store.documents:,} documents, {store.tokens:,} tokens checked")
    print(f"{damaged} damaged" if damaged else "whole")
    return EXIT_DAMAGED if damaged else 0


if __name__ == "__main__":
    run_program(main)
