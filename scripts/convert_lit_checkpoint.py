"""Export a checkpoint of a training run as a Hugging Face folder: safetensors, config, tokenizer.

Reads any checkpoint (sharded or full, from any number of processes), needs no GPU, and converts in the memory of one
layer. A folder is published only after transformers' model and ours give the same logits on real text, in fp32, with
the folder's weights.

With --run_dir instead of --checkpoint, it exports every checkpoint of the run, to folders step-00010000-tokens-21B in
--destination_path and, with --push_to, to branches of that name on the Hub, where main holds the newest. It skips what
is exported already. The training may be running; --watch waits for its next checkpoints.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, command_line, require_at_least, run_program, say_loading

if TYPE_CHECKING:
    from lit_gpt.export.hf_export import WeightFormat
    from lit_gpt.export.parity import Reference

log = logging.getLogger(__name__)

UNIT_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
ADD_BOS = {None: None, "yes": True, "no": False}
PROMPT = "Die Stadt"
NICENESS = 10
"""With --run_dir: on a node that trains, the training comes first."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind

    if arguments.checkpoint is not None and os.path.lexists(arguments.destination_path):  # before it takes a minute
        raise BadInput(f"{arguments.destination_path} exists already: name another destination, or remove it first")

    say_loading(arguments.checkpoint or arguments.run_dir, "PyTorch", "transformers")
    import transformers

    from lit_gpt.export.hf_export import WeightFormat, export, open_checkpoint, open_tokenizer
    from lit_gpt.export.hf_weights import DTYPES
    from lit_gpt.export.parity import Reference

    format = WeightFormat(DTYPES[arguments.dtype], arguments.vocabulary == "cut", arguments.max_shard_size)
    destination = arguments.destination_path.absolute()
    if arguments.run_dir is not None:
        _export_run(arguments, destination, format, Reference(transformers))
        return
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.model_name)
    tokenizer = open_tokenizer(checkpoint, arguments.tokenizer_path)
    add_bos = ADD_BOS[arguments.add_bos]
    parity = export(checkpoint, tokenizer, destination, format, Reference(transformers), arguments.license, add_bos)
    log.info("logits agree: %s", parity)
    log.info("published %s", destination)
    log.info("next: %s", command_line("scripts/generate.py", "--model", arguments.destination_path, "--prompt", PROMPT))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="folder iter-XXXXXXXX-ckpt.pth")
    source.add_argument("--run_dir", type=Path, help="run folder: export each of its checkpoints")
    parser.add_argument(
        "--destination_path", type=Path, required=True,
        help="folder to write, which must not exist; with --run_dir, the folder for all exports",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of the weights (default: bf16)"
    )
    parser.add_argument("--tokenizer_path", type=Path, help="tokenizer folder (default: the run's own)")
    parser.add_argument(
        "--vocabulary", choices=["padded", "cut"], default="padded",
        help="cut: leave out the padding rows of the embedding and of the output projection (default: padded)",
    )  # fmt: skip
    parser.add_argument("--max_shard_size", type=size, default="5GB", help="largest weight file (default: 5GB)")
    parser.add_argument("--model_name", help="model of the registry that the checkpoint must be")
    parser.add_argument(
        "--add_bos", choices=["yes", "no"],
        help="whether documents begin with BOS in training, for a checkpoint of version 0.1.0, which does not say so",
    )  # fmt: skip
    parser.add_argument("--license", default="unknown", help="license id for the model card, from Hugging Face's list")
    run = parser.add_argument_group("with --run_dir")
    run.add_argument("--push_to", metavar="OWNER/MODEL", help="repository on the Hub to upload to; created if missing")
    run.add_argument("--private", action="store_true", help="make a missing repository private")
    run.add_argument("--remove_uploaded", action="store_true", help="remove a folder once its branch is on the Hub")
    run.add_argument("--attempts", type=int, default=8, help="attempts of each request to the Hub (default: 8)")
    run.add_argument(
        "--first_wait_s",
        type=float,
        default=5.0,
        help="seconds before the second attempt; doubles each time (default: 5)",
    )
    run.add_argument(
        "--record", choices=["none", "steps", "documents"], default="steps",
        help="what goes with each model of the training's record: nothing; what each step saw, settings and report "
        "(default); also every part of every document, for which the data is read again",
    )  # fmt: skip
    run.add_argument("--watch", action="store_true", help="wait for new checkpoints, until the last step's is exported")
    run.add_argument("--poll_s", type=float, default=60.0, help="seconds between looks at the run (default: 60)")
    arguments = parser.parse_args(argv)
    if arguments.run_dir is None and (arguments.push_to or arguments.watch):
        raise BadInput("--push_to and --watch go with --run_dir, not with --checkpoint")
    if arguments.push_to is None and (arguments.private or arguments.remove_uploaded):
        raise BadInput("--private and --remove_uploaded go with --push_to")
    require_at_least(arguments, 1, "attempts")
    require_at_least(arguments, 0, "first_wait_s")
    require_at_least(arguments, 0.1, "poll_s")
    return arguments


def _export_run(arguments: argparse.Namespace, destination: Path, format: WeightFormat, reference: Reference) -> None:
    from lit_gpt.export.hub_repository import HubRepository, RetryPolicy, UploadFailed
    from lit_gpt.export.run_export import ExportOptions, RunExport

    os.nice(NICENESS)
    retries = RetryPolicy(arguments.attempts, arguments.first_wait_s)
    try:
        hub = HubRepository(arguments.push_to, retries, private=arguments.private) if arguments.push_to else None
    except UploadFailed as error:
        raise BadInput(str(error)) from None
    options = ExportOptions(
        destination, format, arguments.license, arguments.tokenizer_path, arguments.model_name, hub,
        arguments.remove_uploaded, ADD_BOS[arguments.add_bos], arguments.record,
    )  # fmt: skip
    run = RunExport(arguments.run_dir, options, reference)
    while True:
        try:
            found = run.export_new()
        except UploadFailed as error:
            if not arguments.watch:
                raise BadInput(f"{error}; the same command goes on from there") from None
            log.warning("%s; the next attempt is in %g s", error, arguments.poll_s)
            found = 0
        if run.run_is_over or (not arguments.watch and not found):
            break
        if not found:
            time.sleep(arguments.poll_s)
    if run.damaged:
        raise BadInput(f"not exported, because they are damaged: {', '.join(run.damaged)}")
    log.info("every checkpoint of %s is exported", arguments.run_dir)


def size(text: str) -> int:
    """Bytes of "5GB", "200MB" or a plain number."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB|)", text.upper())
    if not match or not int(match[1]):
        raise ArgumentTypeError(f"{text!r} is no size: give a number and KB, MB or GB")
    return int(match[1]) * UNIT_BYTES[match[2]]


if __name__ == "__main__":
    run_program(main)
