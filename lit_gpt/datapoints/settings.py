"""Settings of the run folder and its record. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from lit_gpt.cli import BadInput, SettingsSlice
from lit_gpt.values import PathText


@dataclass(frozen=True)
class DatapointSettings(SettingsSlice):
    """The run folder and the record of what a run saw."""

    out_dir: PathText | None = None
    """Run folder. Default: $MODEL_NAME if set, else out/<model_name>."""
    allow_changed_data: bool = False
    """Continue although the data, its order or the batch differ from those of the checkpoint, at the same row."""
    new_data: bool = False
    """Where the data, its order or the batch differ from those of the checkpoint, begin the data at its start, with the
    trained state: continued pretraining. Steps and schedule go on; without a difference it does nothing."""

    def check(self) -> None:
        super().check()
        if self.new_data and self.allow_changed_data:
            raise BadInput(
                "--new_data true with --allow_changed_data true: the first begins the data at its start, the second "
                "goes on at the same row. Choose one"
            )
