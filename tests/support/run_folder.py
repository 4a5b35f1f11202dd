"""Run folders by the training's own writers, without a model: for tests of what reads them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint.checkpoint import seal, temporary_path
from lit_gpt.checkpoint.record import checkpoint_name
from lit_gpt.config import REGISTRY
from lit_gpt.datapoints.attempts import Mark
from lit_gpt.datapoints.log import FOLDER, DatapointLog
from lit_gpt.datapoints.run_folder import write_settings
from lit_gpt.train.sampling import Sample
from lit_gpt.train.settings import Settings
from lit_gpt.train.trackers import Trackers

ROWS, TARGETS = 8, 500
"""Of a step."""
FACTS: dict[str, Any] = dict(
    datasets=["0" * 64, "1" * 64], mixture=[3072, 1024], seed=3407, block_size=64, packing="window", packing_version=1,
    order_version=1, pool_shards=64, global_batch_size=ROWS, cross_document_attention=False,
)  # fmt: skip


class RecordedRun:
    """A run whose steps are made up, written as the training writes it."""

    def __init__(self, folder: Path, *, max_steps: int = 40, **settings: Any) -> None:
        self.folder = folder
        folder.mkdir()
        values: dict[str, Any] = dict(
            model_name="debug", train_data_dir=["/data/wiki:3", "/data/web:1"], tensorboard=False, max_steps=max_steps
        )
        self._settings = Settings(**{**values, **settings})
        self._marks: dict[int, Mark] = {}
        self._resolved = {"attention": "torch", "max_steps": max_steps, "packages": {}}

    def start(self, after: int = 0, **details: Any) -> None:
        """A start of the program, which continues after a step that was saved."""
        described = dict(
            world_size=1, micro_batch_size=4, train_data_dir=["/data/wiki", "/data/web"], left_out=[],
            changed_settings={}, data_from_step=0, resumed_from=None,
        )  # fmt: skip
        self.datapoints = DatapointLog.open(
            self.folder / FOLDER, FACTS, parent=self._marks.get(after), details={**described, **details}
        )
        write_settings(self.folder, asdict(self._settings), self._resolved)
        self.trackers = Trackers(self.folder, after, self._settings, {}, self.datapoints.attempt)

    def step(self, number: int, *, loss: float, **columns: Any) -> None:
        """A step and its line of metrics."""
        self.datapoints.append(number, ROWS * (number - 1), ROWS, TARGETS, digest=number)
        row = dict(
            step=number, loss=loss, learning_rate=1e-3 / number, grad_norm=1.5, targets=TARGETS, epoch=0,
            tokens=TARGETS * number, tokens_per_s=1000.0, step_s=0.5, data_wait_s=0.01, memory_gib=0.0,
            compiled_graphs=0, skipped_steps=0,
        )  # fmt: skip
        self.trackers.log(row | columns)

    def sample(self, step: int, text: str) -> None:
        self.trackers.log_samples(step, [Sample("Am Morgen", text, 4, False)])

    def save(self, step: int) -> None:
        """A checkpoint after the newest step."""
        mark = self._marks[step] = self.datapoints.flush_and_fsync()
        final = self.folder / checkpoint_name(step)
        temporary = temporary_path(final)
        temporary.mkdir()
        (temporary / "state.pth").write_bytes(bytes(3000))
        facts = dict(
            step=step, slot=ROWS * step, tokens=TARGETS * step, settings={"max_steps": self._settings.max_steps},
            model=asdict(REGISTRY["debug"]), datapoint_log=mark._asdict(), world_size=1,
            environment={"time": "2026-11-27T12:00:00+0000"},
        )  # fmt: skip
        seal(temporary, final, facts)

    def end(self, place: str | None = None) -> None:
        """The program's end; place: what the watchdog's last heartbeat says, None for none."""
        self.trackers.close()
        self.datapoints.close()
        if place is not None:
            beats = self.folder / "watchdog"
            beats.mkdir(exist_ok=True)
            said = {"rank": 0, "who": "rank 0", "step": 0, "place": place}
            (beats / "rank-00000.json").write_text(json.dumps(said) + "\n")


def killed_and_resumed(folder: Path) -> Path:
    """20 steps and a kill, after a checkpoint at step 10; then from 10 to the end, step 40."""
    run = RecordedRun(folder)
    run.start()
    for number in range(1, 21):
        run.step(number, loss=9 - number / 8)
        if number == 10:
            run.save(10)
    run.end()
    run.start(10, changed_settings={"learning_rate": [1e-3, 5e-4]})
    for number in range(11, 41):
        run.step(
            number, loss=9 - number / 8, **({"val_loss": 5.25, "val_bits_per_byte": 1.5} if number % 20 == 0 else {})
        )
        if number % 20 == 0:
            run.sample(number, f" nach {number} Schritten")
            run.save(number)
    run.end("finished")
    return folder


def rolled_back(folder: Path) -> Path:
    """A spike at step 16 after a checkpoint at 10: back to it, the rows of two steps are left out; stopped at 30."""
    run = RecordedRun(folder)
    run.start()
    for number in range(1, 17):
        run.step(number, loss=9 - number / 8, **({"grad_norm": 193.5} if number == 16 else {}))
        if number == 10:
            run.save(10)
    run.datapoints.deviation("skipped", 16, reason="spike", grad_norm="193.5", first_slot=120, rows=ROWS)
    run.datapoints.deviation("rollback", 16, to_step=10, first_slot=112, rows=2 * ROWS)
    run.end()
    run.start(10, left_out=[[112, 128]])
    for number in range(11, 31):
        run.step(number, loss=9 - number / 8)
    run.save(30)
    run.end("stopped")
    return folder
