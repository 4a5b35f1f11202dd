"""What is computed: the decoder, its attention, its MLP and its loss, in bf16 and in 8 bits.

`from lit_gpt.model import GPT` works; torch is imported by that, not by importing the room.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("GPT", "initialize"):
        from lit_gpt.model import gpt

        return getattr(gpt, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
