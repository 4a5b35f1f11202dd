"""Settings that the model reads. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_gpt.cli import BadInput, SettingsSlice
from lit_gpt.config import Config


@dataclass(frozen=True)
class ModelSettings(SettingsSlice):
    """The model: its shape, its precision, and what computes it."""

    model_name: str = "LLaMmlein_1B"
    """Shape of the model: a name from the registry in lit_gpt/config.py."""
    vocab_size: int | None = None
    """Ids of the tokenizer, if not the model's published vocabulary."""
    block_size: int | None = None
    """Tokens a row, if not the model's own."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "bf16-mixed"
    """bf16-mixed: fp32 weights and optimizer, bf16 computation; bf16-true: weights and optimizer in bf16 as well,
    for less memory; weights take stochastic rounding, so that small updates are not lost."""
    attention: Literal["auto", "fa3", "fa4", "fa2", "xformers", "torch"] = "auto"
    """Attention kernel; auto takes the fastest that the device and the installed packages allow, and logs it."""
    mlp: Literal["auto", "quack", "torch"] = "auto"
    """What computes the MLP and adds the residual: quack in its GEMMs' epilogues, or torch layer by layer. auto:
    quack on Hopper GPUs that have it."""
    compile: bool | None = None
    """torch.compile each block and the loss. Default: on GPUs."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Products of matrices of the blocks in 8 bits, with one scale a tensor, for speed, or (torchao's) a row, which
    keeps more digits and was slower than bf16; not with 32-true."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What blocks compute again for the backward pass, to save memory. selective: all but products of matrices and
    attention; full: everything but each block's input."""

    @property
    def config(self) -> Config:
        """Shape of the model, with the vocabulary and the rows that the settings ask for."""
        overrides = {name: getattr(self, name) for name in ("block_size", "vocab_size") if getattr(self, name)}
        return Config.from_name(self.model_name, **overrides)

    def config_for(self, data_vocab_size: int) -> Config:
        """The shape for data of so many ids; raises BadInput if the model, or --vocab_size, has another vocabulary."""
        if self.vocab_size not in (None, data_vocab_size):
            raise BadInput(
                f"--vocab_size {self.vocab_size}, but the data has a vocabulary of {data_vocab_size} ids: leave it "
                f"out, or give {data_vocab_size}"
            )
        return self.config.with_vocabulary(data_vocab_size)

    def check(self) -> None:
        super().check()
        Config.from_name(self.model_name)
        self.require_at_least(1, "vocab_size", "block_size")
        if self.float8 != "none" and self.precision == "32-true":
            raise BadInput(f"--float8 {self.float8} with --precision 32-true. Valid with it: bf16-mixed, bf16-true")
        if self.float8 != "none" and self.mlp == "quack":
            raise BadInput(f"--float8 {self.float8} with --mlp quack, which has no 8 bits. Valid with it: auto, torch")
