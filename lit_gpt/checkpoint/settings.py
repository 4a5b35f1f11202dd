"""Settings of checkpoints. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_gpt.cli import SettingsSlice


@dataclass(frozen=True)
class CheckpointSettings(SettingsSlice):
    """Checkpoints: when and how they are saved, which stay, and where a run goes on from."""

    resume: str | None = None
    """A checkpoint to go on from, or "auto": the newest whole one of what the run folder trained last, or a fresh start
    in an empty one."""
    save_interval_steps: int = 10_000
    """Steps between checkpoints; the last step and a stop signal always save."""
    keep_last_checkpoints: int = 2
    """Newest checkpoints that stay when a new one is whole; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are a multiple of this stay for ever; 0: none does."""
    state_dict_type: Literal["auto", "sharded", "full"] = "auto"
    """Checkpoints: each rank writes its part, or rank 0 one state.pth. auto: full on one process, else sharded."""
    async_save: bool | None = None
    """Write checkpoints beside the training, from a copy of the state in host memory; the last one is waited for.
    Default: on GPUs; on CPUs both would compete for the same cores."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "save_interval_steps")
        self.require_not_negative("keep_last_checkpoints", "keep_every_steps")
