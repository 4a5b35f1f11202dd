"""Settings of the run folder and its record. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lit_gpt.cli import SettingsSlice
from lit_gpt.values import PathText


@dataclass(frozen=True)
class DatapointSettings(SettingsSlice):
    """The run folder and the record of what a run saw."""

    out_dir: PathText | None = None
    """Run folder. Default: $MODEL_NAME if set, else out/<model_name>."""
    allow_changed_data: bool = False
    """Continue although the data, its order or the batch differ from those that the run began with."""
