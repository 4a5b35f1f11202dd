"""Convert a folder that create.sh wrote into one GGUF file for llama.cpp, tokenizer included.

The file is published only after a proof that it gives the folder's ids for texts where tokenizers differ: by
llama.cpp's rules and, where xllamacpp is installed (the extra llama-cpp), by llama.cpp itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import Parser, run_program, say_loading
from lit_gpt.export.exported_folder import require_exported

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder that create.sh wrote")
    parser.add_argument("--destination_path", type=Path, required=True, help="file to write, such as model.gguf")
    parser.add_argument(
        "--type", choices=["f16", "bf16", "q8_0"], default="bf16", help="data type of the matrices (default: bf16)"
    )
    arguments = parser.parse_args(argv)
    require_exported(arguments.model)

    say_loading(arguments.model, "PyTorch")
    from lit_gpt.export.gguf_export import write_gguf

    destination = arguments.destination_path.absolute()
    write_gguf(arguments.model, destination, arguments.type)
    log.info("published %s (%.1f MB)", destination, destination.stat().st_size / 1e6)


if __name__ == "__main__":
    run_program(main)
