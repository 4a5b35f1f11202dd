"""Continue a prompt with an exported model, by transformers alone, as users of the published folder do."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program, say_loading
from lit_gpt.export.exported_folder import require_exported

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder that create.sh wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="most tokens to generate (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="draw from this many likeliest tokens (default: 50)")
    parser.add_argument("--seed", type=int, default=3407, help="of the draws (default: 3407)")
    print(generate(parser.parse_args(argv)))


def generate(arguments: argparse.Namespace) -> str:
    require_exported(arguments.model)
    require_at_least(arguments, 1, "max_new_tokens", "top_k")
    require_at_least(arguments, 0, "temperature")

    say_loading(arguments.model, "PyTorch", "transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of milliseconds

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    model.to(device)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    prompt_tokens, context = inputs.input_ids.shape[1], model.config.max_position_embeddings
    if not 0 < prompt_tokens <= context - arguments.max_new_tokens:
        raise BadInput(
            f"--prompt of {prompt_tokens} tokens and --max_new_tokens {arguments.max_new_tokens}: "
            f"the prompt needs at least one token, and the model reads {context} in all"
        )
    set_seed(arguments.seed)
    drawing = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    ids = model.generate(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")},
        max_new_tokens=arguments.max_new_tokens,
        **(drawing if arguments.temperature else {"do_sample": False}),
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    run_program(main)
