"""What a run is expected to need, as --plan computes it: plan.json in the run folder, for the report to compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lit_gpt.config import Config
from lit_gpt.datapoints.line_log import or_alarm
from lit_gpt.files import write_json
from lit_gpt.train.memory_plan import peak_bytes
from lit_gpt.train.run_length import RunLength
from lit_gpt.train.settings import Settings

FILE = "plan.json"


def write_expectation(run_dir: Path, settings: Settings, config: Config, world_size: int, length: RunLength) -> None:
    """settings: resolved. The memory is that of a GPU, so a run on CPUs has none; the rate is that of all ranks."""
    shards = settings.shards(settings.devices or 1, world_size)
    memory = peak_bytes(config, settings, world_size, shards) / 2**30 if settings.accelerator != "cpu" else None
    rate = settings.plan_tokens_per_s
    expected = {
        "memory_gib": memory,
        "checkpoint_bytes": 3 * (2 if settings.precision == "bf16-true" else 4) * config.parameters,
        "tokens_per_s": rate * world_size if rate else None,
        "steps": length.steps,
        "tokens": length.tokens,
    }
    or_alarm(run_dir / FILE, partial(write_json, run_dir / FILE, expected))
