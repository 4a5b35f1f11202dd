"""Settings of checkpoints. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_gpt.cli import SettingsSlice
from lit_gpt.values import PathText


@dataclass(frozen=True)
class CheckpointSettings(SettingsSlice):
    """Checkpoints: when and how they are saved, which are kept, and from which the run continues."""

    resume: PathText | None = None
    """Checkpoint to continue from, or "auto": the newest whole one of the run's latest branch, or a fresh start in an
    empty run folder."""
    save_interval_steps: int = 10_000
    """Steps between checkpoints; the last step and a stop signal always save."""
    keep_last_checkpoints: int = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are a multiple of this are kept for ever; 0: none is."""
    state_dict_type: Literal["auto", "sharded", "full"] = "auto"
    """sharded: each rank writes its part; full: rank 0 writes state.pth; auto: full on one process, else sharded."""
    async_save: bool | None = None
    """Write checkpoints while training continues, from a copy of the state in host memory; the run waits for the last
    one. Default: true on GPUs, false on CPUs, where both would compete for the same cores."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "save_interval_steps")
        self.require_not_negative("keep_last_checkpoints", "keep_every_steps")
