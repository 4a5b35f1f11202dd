"""Evaluate an exported folder, or a checkpoint: loss and bits per byte on a validation split, and tasks of lm-eval.

A checkpoint is first exported to a temporary folder, with all of the export's checks, so both ways measure the same.
Validation splits, and tasks with local data such as scripts/make_cloze.py's, need no network.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program, say_loading
from lit_gpt.data.token_store import TokenStore
from lit_gpt.export.exported_folder import require_exported

if TYPE_CHECKING:
    from lit_gpt.eval.evaluation import Score
    from lit_gpt.train.validation import Validation

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind

    store = TokenStore.open(arguments.val_data_dir) if arguments.val_data_dir else None

    say_loading(arguments.model or arguments.checkpoint, "PyTorch")
    import torch

    from lit_gpt.eval.evaluation import folder_loss, task_scores

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _folder(arguments, store.tokenizer_fingerprint if store else None) as folder:
        loss = store and folder_loss(
            folder, store, device, micro_batch_size=arguments.batch_size, max_rows=arguments.eval_max_rows,
            cross_document_attention=arguments.cross_document_attention,
        )  # fmt: skip
        scores = arguments.tasks and task_scores(
            folder, arguments.tasks, arguments.task_dir, device, batch_size=arguments.batch_size, limit=arguments.limit
        )
    _report(arguments, loss or None, scores or [])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder that create.sh wrote")
    source.add_argument("--checkpoint", type=Path, help="folder iter-XXXXXXXX-ckpt.pth")
    parser.add_argument(
        "--val_data_dir", type="path", help="validation split to measure the loss on, with the model's tokenizer"
    )
    parser.add_argument("--eval_max_rows", type=int, help="rows of the split (default: all)")
    parser.add_argument(
        "--cross_document_attention", action="store_true", help="attend across documents, if the run was trained so"
    )
    parser.add_argument("--tasks", nargs="+", action="extend", default=[], help="names of lm-eval's tasks")
    parser.add_argument("--task_dir", type=Path, help="folder with YAML files of more tasks")
    parser.add_argument("--limit", type=int, help="examples of each task (default: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows or requests in one forward pass (default: 8)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of --checkpoint's weights (default: bf16)"
    )
    parser.add_argument("--tokenizer_path", type=Path, help="tokenizer for --checkpoint (default: the run's own)")
    parser.add_argument(
        "--scratch_dir", type=Path, help="where --checkpoint is exported to (default: the system's temporary folder)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; must not exist")
    arguments = parser.parse_args(argv)
    if not arguments.val_data_dir and not arguments.tasks:
        raise BadInput("nothing to measure: give --val_data_dir, --tasks or both")
    if arguments.model is not None:
        require_exported(arguments.model)
    require_at_least(arguments, 1, "eval_max_rows", "limit", "batch_size")
    for name in ("task_dir", "scratch_dir"):
        if (path := getattr(arguments, name)) is not None and not path.is_dir():
            raise BadInput(f"--{name} {path}: no such folder")
    if arguments.output is not None and (arguments.output.exists() or not arguments.output.parent.is_dir()):
        why = "exists already" if arguments.output.exists() else "its folder does not exist"
        raise BadInput(f"--output {arguments.output}: {why}")
    return arguments


@contextmanager
def _folder(arguments: argparse.Namespace, store_fingerprint: str | None) -> Iterator[Path]:
    """The exported folder: --model, or --checkpoint's export, which is removed at the end."""
    if arguments.model is not None:
        yield arguments.model
        return

    say_loading(arguments.checkpoint, "transformers")
    import transformers

    from lit_gpt.export.hf_export import open_checkpoint, open_tokenizer, temporary_export
    from lit_gpt.export.hf_weights import DTYPES
    from lit_gpt.export.parity import Reference

    checkpoint = open_checkpoint(arguments.checkpoint, None)
    tokenizer = open_tokenizer(checkpoint, arguments.tokenizer_path)
    if store_fingerprint not in (None, tokenizer.fingerprint):
        raise BadInput(f"--val_data_dir {arguments.val_data_dir} was made with another tokenizer than the checkpoint's")
    dtype, reference = DTYPES[arguments.dtype], Reference(transformers)
    with temporary_export(checkpoint, tokenizer, dtype, reference, arguments.scratch_dir) as folder:
        yield folder


def _report(arguments: argparse.Namespace, loss: Validation | None, scores: Sequence[Score]) -> None:
    """Print a table, and write --output."""
    from rich.console import Console
    from rich.table import Table

    measured = arguments.model or arguments.checkpoint
    table = Table("task", "metric", "value", "stderr", title=str(measured.name))
    units = {"loss": "nats a token", "perplexity": "", "bits_per_byte": "bits a byte"}
    for name, value in loss._asdict().items() if loss else ():
        table.add_row("validation split", f"{name} ({units[name]})" if units[name] else name, f"{value:.4f}", "")
    for score in scores:
        error = "" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(score.task, score.metric, f"{score.value:.4f}", error)
    Console().print(table)
    if arguments.output is not None:
        from lit_gpt.files import write_json

        found: dict[str, Any] = {
            "model": str(measured),
            "validation": loss and {"val_data_dir": arguments.val_data_dir, **loss._asdict()},
            "tasks": [score._asdict() for score in scores],
        }
        write_json(arguments.output, found)
        log.info("wrote %s", arguments.output)


if __name__ == "__main__":
    run_program(main)
