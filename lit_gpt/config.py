"""Shapes of the LLaMA models that the project trains, and sizes derived from them. No torch: importing this is instant.

A published size is one registry entry; `Config.from_name` copies it with overrides for tests and experiments.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from lit_gpt.cli import BadInput

IGNORE_INDEX = -100
"""Target of a position that predicts nothing: the end of a document, and padding."""
VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, which suits the tiles of GEMMs."""


@dataclass(frozen=True)
class Config:
    """Shape of one LLaMA model: pre-norm (RMSNorm), RoPE, SwiGLU, no biases, untied head."""

    name: str
    """Name in the registry; the default run folder is out/<name>."""
    n_layer: int
    """Blocks."""
    n_head: int
    """Query heads of a block."""
    n_query_groups: int
    """Key-value heads of a block; each serves n_head / n_query_groups query heads."""
    n_embd: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the MLP's hidden layer."""
    block_size: int = 2048
    """Tokens of a row, which is also the longest context."""
    vocab_size: int = 32_010
    """Size of the tokenizer's vocabulary (the published one: 32,000 BPE tokens and 10 added ones)."""
    any_vocabulary: bool = False
    """True: the model takes the vocabulary size of its data; False: data with another vocabulary size is refused."""
    norm_eps: float = 1e-5
    """RMSNorm's epsilon, added to the mean square."""
    rope_base: float = 10_000.0
    """Base of RoPE's frequencies (theta)."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} of model {self.name}: must be at least 1")
        if self.n_embd % self.n_head or self.head_size % 2:
            raise BadInput(
                f"n_embd={self.n_embd} of model {self.name}: must be an even multiple of n_head={self.n_head}"
            )
        if self.n_head % self.n_query_groups:
            raise BadInput(
                f"n_query_groups={self.n_query_groups} of model {self.name}: must divide n_head={self.n_head}"
            )

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Config:
        """The registered shape `name` with some fields replaced; raises BadInput for an unknown name or field."""
        if name not in REGISTRY:
            close = difflib.get_close_matches(name, REGISTRY, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise BadInput(f"unknown model_name {name!r}{hint} Valid: {', '.join(REGISTRY)}")
        valid = {field.name for field in fields(cls)} - {"name"}
        if unknown := set(overrides) - valid:
            raise BadInput(f"unknown model field {sorted(unknown)[0]!r}. Valid: {', '.join(sorted(valid))}")
        return replace(REGISTRY[name], **overrides)

    def with_vocabulary(self, vocab_size: int) -> Config:
        """This shape for data of `vocab_size` ids; raises BadInput if the model is bound to another vocabulary size."""
        if self.any_vocabulary:
            return replace(self, vocab_size=vocab_size)
        if vocab_size != self.vocab_size:
            raise BadInput(
                f"the data has a vocabulary of {vocab_size} ids, model {self.name} one of {self.vocab_size}: "
                f"prepare the data with the model's tokenizer, or train with --vocab_size {vocab_size}"
            )
        return self

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output projection."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def parameters(self) -> int:
        """Weights of the whole model, embedding and head included."""
        return 2 * self.padded_vocab_size * self.n_embd + self.n_layer * self.block_parameters + self.n_embd

    @property
    def block_parameters(self) -> int:
        """Weights of one block."""
        qkv = self.n_embd * (self.n_head + 2 * self.n_query_groups) * self.head_size
        return qkv + self.n_embd**2 + 3 * self.n_embd * self.intermediate_size + 2 * self.n_embd

    def flops_per_token(self, *, with_embedding: bool) -> int:
        """FLOPs of one token's forward and backward pass in a row of block_size tokens.

        6 N + 12 n_layer n_embd block_size, attention counted as if not causal: the rule of PaLM (arXiv:2204.02311,
        appendix B). N is all weights, or those without the embedding table, which multiplies nothing.
        """
        counted = self.parameters - (0 if with_embedding else self.padded_vocab_size * self.n_embd)
        return 6 * counted + 12 * self.n_layer * self.n_embd * self.block_size


_120M = dict(n_layer=12, n_head=12, n_query_groups=4, n_embd=768, intermediate_size=2048)
_1B = dict(n_layer=22, n_head=32, n_query_groups=4, n_embd=2048, intermediate_size=5632)
_7B = dict(n_layer=32, n_head=32, n_query_groups=32, n_embd=4096, intermediate_size=11008)
_DEBUG: dict[str, Any] = dict(
    n_layer=4, n_head=4, n_query_groups=2, n_embd=128, intermediate_size=352,
    block_size=256, vocab_size=4096, any_vocabulary=True,
)  # fmt: skip

REGISTRY: dict[str, Config] = {
    name: Config(name=name, **shape)
    for name, shape in {
        "LLaMmlein_120M": _120M,
        "LLaMmlein_1B": _1B,
        "LLaMmlein_7B": _7B,
        "tiny_LLaMA_120M": _120M,
        "tiny_LLaMA_1b": _1B,
        "debug": _DEBUG,
    }.items()
}
