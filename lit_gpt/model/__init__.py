"""What is computed: the decoder, its attention, its MLP and its loss, in bf16 and in float8.

`from lit_gpt.model import GPT` works, and only that imports torch: importing the room does not.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "GPT":
        from lit_gpt.model.gpt import GPT

        return GPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
