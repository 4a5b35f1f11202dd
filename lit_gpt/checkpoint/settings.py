"""Settings of checkpoints. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_gpt.cli import BadInput, SettingsSlice
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
    memory_checkpoint_dir: PathText | None = None
    """Folder in the memory of each node, such as /dev/shm, for further checkpoints between those in the run folder: the
    newest is kept, each node holds the parts of its ranks, and --resume auto takes it where it is newer and whole on
    every node."""
    memory_checkpoint_steps: int | None = None
    """Steps between checkpoints in memory_checkpoint_dir."""
    async_save: bool | None = None
    """Write checkpoints while training continues, from a copy of the state in host memory; the run waits for the last
    one. Default: true on GPUs, false on CPUs, where both would compete for the same cores."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "save_interval_steps", "memory_checkpoint_steps")
        self.require_not_negative("keep_last_checkpoints", "keep_every_steps")
        if (self.memory_checkpoint_dir is None) != (self.memory_checkpoint_steps is None):
            raise BadInput("--memory_checkpoint_dir and --memory_checkpoint_steps: give both, or neither")
        if self.memory_checkpoint_steps and self.memory_checkpoint_steps >= self.save_interval_steps:
            raise BadInput(
                f"--memory_checkpoint_steps {self.memory_checkpoint_steps}: must be below --save_interval_steps "
                f"{self.save_interval_steps}, or the run folder has all of them already"
            )
