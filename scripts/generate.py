"""Continue a prompt with an exported model, by transformers alone, as users of the published folder do.

    python scripts/generate.py --model out/model --prompt "Am Morgen"
    python scripts/generate.py --model out/model --chat                        one prompt after the other
    python scripts/generate.py --checkpoint out/debug/iter-00000240-ckpt.pth --chat

A checkpoint is first exported to a temporary folder, with all of the export's checks. With --chat each line is a
prompt, and its continuation appears as it is written; an empty line goes on with the last text, Ctrl-C stops it, Ctrl-D
ends. A tokenizer with a chat template makes it a conversation; models that are trained here only continue texts.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program, say_loading
from lit_gpt.export.exported_folder import require_exported

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    say_loading(arguments.model or arguments.checkpoint, "PyTorch", "transformers")
    with folder_of(arguments) as folder:
        writer = Writer(folder, arguments)
        if arguments.chat:
            chat(writer)
        else:
            ids = writer.ids_of(arguments.prompt)
            writer.write(ids)
            print(writer.text_of(ids))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder that create.sh wrote")
    source.add_argument("--checkpoint", type=Path, help="folder iter-XXXXXXXX-ckpt.pth")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--prompt", help="text to continue")
    task.add_argument("--chat", action="store_true", help="ask for prompts until Ctrl-D")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="most tokens to generate (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="draw from this many likeliest tokens (default: 50)")
    parser.add_argument(
        "--top_p", type=float, default=1.0,
        help="draw from the likeliest tokens that have this probability together (default: 1, all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=3407, help="of the draws (default: 3407)")
    parser.add_argument("--tokenizer_path", type=Path, help="tokenizer for --checkpoint (default: the run's own)")
    arguments = parser.parse_args(argv)
    if arguments.model is not None:
        require_exported(arguments.model)
    require_at_least(arguments, 1, "max_new_tokens", "top_k")
    require_at_least(arguments, 0, "temperature")
    if not 0 < arguments.top_p <= 1:
        raise BadInput(f"--top_p {arguments.top_p}: must be above 0 and at most 1")
    return arguments


@contextmanager
def folder_of(arguments: argparse.Namespace) -> Iterator[Path]:
    """The exported folder: --model, or --checkpoint's export, which is removed at the end."""
    if arguments.model is not None:
        yield arguments.model
        return

    import torch
    import transformers

    from lit_gpt.export.hf_export import open_checkpoint, open_tokenizer, temporary_export
    from lit_gpt.export.parity import Reference

    checkpoint = open_checkpoint(arguments.checkpoint, None)
    tokenizer = open_tokenizer(checkpoint, arguments.tokenizer_path)
    with temporary_export(checkpoint, tokenizer, torch.bfloat16, Reference(transformers)) as folder:
        yield folder


class Writer:
    """A loaded model that continues texts; its draws follow from the seed and what it wrote before."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of milliseconds
        self._arguments = arguments
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:  # without trust_remote_code, transformers would ask whether to run the folder's code
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 (the library raises any kind)
            raise BadInput(f"transformers cannot load {folder}: {' '.join(str(error).split())[:200]}") from None
        self._model = model.to(self._device)
        self.context: int = self._model.config.max_position_embeddings
        set_seed(arguments.seed)

    def ids_of(self, text: str) -> list[int]:
        """The ids of a prompt; BadInput unless it has one and leaves room for --max_new_tokens."""
        ids: list[int] = self.tokenizer(text).input_ids
        if not 0 < len(ids) <= self.context - self._arguments.max_new_tokens:
            raise BadInput(
                f"--prompt of {len(ids)} tokens and --max_new_tokens {self._arguments.max_new_tokens}: "
                f"the prompt needs at least one token, and the model reads {self.context} in all"
            )
        return ids

    def text_of(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def write(self, ids: list[int], *, aloud: bool = False) -> None:
        """Append what follows `ids`; aloud: print it as it is written."""
        import torch
        from transformers import TextStreamer

        arguments = self._arguments
        drawing: dict[str, Any] = {"do_sample": False}
        if arguments.temperature:
            drawing = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
            drawing["do_sample"] = True
        inputs = torch.tensor([ids], device=self._device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if aloud else None
        found = self._model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=arguments.max_new_tokens, streamer=streamer,
            **drawing,
        )  # fmt: skip
        ids += found[0, len(ids) :].tolist()


def chat(writer: Writer) -> None:
    """Ask for prompts until the input ends. A text that fills the context loses its beginning, which is said."""
    room = writer.context - writer._arguments.max_new_tokens
    if room < 1:
        raise BadInput(f"--max_new_tokens {writer._arguments.max_new_tokens}: the model reads {writer.context} in all")
    ids: list[int] = []
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if writer.tokenizer.chat_template and line:
            messages.append({"role": "user", "content": line})
            found = writer.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            ids = found["input_ids"]
        elif line:
            ids = writer.tokenizer(line).input_ids
        if not ids:
            continue
        if len(ids) > room:
            log.info("the first %d tokens are forgotten: the model reads %d in all", len(ids) - room, writer.context)
            ids = ids[-room:]
        asked = len(ids)
        try:
            writer.write(ids, aloud=True)
        except KeyboardInterrupt:
            print()
        messages.append({"role": "assistant", "content": writer.text_of(ids[asked:])})


if __name__ == "__main__":
    run_program(main)
