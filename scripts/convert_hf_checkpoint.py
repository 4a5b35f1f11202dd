"""Import a Hugging Face LLaMA (safetensors, or .bin without running code) as a checkpoint to continue training from.

An iter-*.pth of TinyLlama's or LLäMmlein's published programs is imported too: weights only, not the optimizer.

The checkpoint has step 0 and no optimizer state; the training program starts from it by `--resume PATH`. It is
published only after transformers' model and ours give the same logits on real text, in fp32.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, run_program, say_loading

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="Hugging Face model folder, or iter-*.pth")
    parser.add_argument(
        "--destination_path", type=Path, required=True, help="checkpoint to write: RUN_FOLDER/iter-00000000-ckpt.pth"
    )
    parser.add_argument("--model_name", help="model of the registry that it must be (default: the first of its shape)")
    parser.add_argument("--tokenizer_path", type=Path, help="tokenizer for the training (default: the folder's own)")
    arguments = parser.parse_args(argv)
    destination = arguments.destination_path.absolute()
    if arguments.checkpoint_dir.suffix in (".json", ".safetensors", ".bin"):
        given = arguments.checkpoint_dir
        raise BadInput(f"--checkpoint_dir {given}: that is a file of a model's folder; give the folder, {given.parent}")
    if arguments.checkpoint_dir.is_file():
        say_loading(arguments.checkpoint_dir, "PyTorch")
        from lit_gpt.export.hf_import import import_legacy

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        tokenizer_path = arguments.tokenizer_path.absolute() if arguments.tokenizer_path else None
        parity = import_legacy(
            arguments.checkpoint_dir.absolute(), destination,
            model_name=arguments.model_name, tokenizer_path=tokenizer_path,
        )  # fmt: skip
        log.info("logits agree: %s", parity)
        log.info("published %s", destination)
        return
    if not (arguments.checkpoint_dir / "config.json").is_file():
        raise BadInput(f"--checkpoint_dir {arguments.checkpoint_dir}: holds no config.json, so it is no model's folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind

    say_loading(arguments.checkpoint_dir, "PyTorch", "transformers")
    import transformers

    from lit_gpt.export.hf_import import import_folder
    from lit_gpt.export.parity import Reference

    parity = import_folder(
        arguments.checkpoint_dir.absolute(),
        arguments.destination_path.absolute(),
        Reference(transformers),
        model_name=arguments.model_name,
        tokenizer_path=arguments.tokenizer_path,
    )
    log.info("logits agree: %s", parity)
    log.info("published %s", arguments.destination_path)


if __name__ == "__main__":
    run_program(main)
