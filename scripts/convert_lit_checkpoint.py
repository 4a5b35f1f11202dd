"""Export a checkpoint of a training run as a Hugging Face folder: safetensors, config, tokenizer.

Works on any checkpoint (sharded or full, from any number of processes), without a GPU, in the memory of one layer. The
folder appears only after the logits of transformers' model and of ours agree on real text, in fp32, with its weights.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from lit_gpt.cli import Parser, run_program

log = logging.getLogger(__name__)

UNIT_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder iter-XXXXXXXX-ckpt.pth")
    parser.add_argument("--destination_path", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of the weights")
    parser.add_argument("--tokenizer_path", type=Path, help="tokenizer folder (default: the run's own)")
    parser.add_argument(
        "--vocabulary", choices=["padded", "cut"], default="padded",
        help="cut: leave out the rows of the embedding and of the head that no token has",
    )  # fmt: skip
    parser.add_argument("--max_shard_size", type=size, default="5GB", help="of a weight file (default: 5GB)")
    parser.add_argument("--model_name", help="registered model that the checkpoint must be")
    parser.add_argument("--license", default="unknown", help="for the model card, an id of Hugging Face's list")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind

    import transformers

    from lit_gpt.hf_export import Form, export, open_checkpoint, open_tokenizer
    from lit_gpt.hf_weights import DTYPES
    from lit_gpt.parity import Twin

    checkpoint = open_checkpoint(arguments.checkpoint, arguments.model_name)
    tokenizer = open_tokenizer(checkpoint, arguments.tokenizer_path)
    form = Form(DTYPES[arguments.dtype], arguments.vocabulary == "cut", arguments.max_shard_size)
    destination = arguments.destination_path.absolute()
    parity = export(checkpoint, tokenizer, destination, form, Twin(transformers), arguments.license)
    log.info("logits agree: %s", parity)
    log.info("published %s", destination)


def size(text: str) -> int:
    """Bytes of "5GB", "200MB" or a plain number."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB|)", text.upper())
    if not match or not int(match[1]):
        raise ArgumentTypeError(f"{text!r} is no size: give a number and KB, MB or GB")
    return int(match[1]) * UNIT_BYTES[match[2]]


if __name__ == "__main__":
    run_program(main)
