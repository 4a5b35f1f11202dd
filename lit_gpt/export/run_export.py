"""Every checkpoint of a run -> a Hugging Face folder of its own and, if asked, a branch of a repository on the Hub.

A folder and its branch are named by what the checkpoint has seen: step-00010000-tokens-21B. Oldest first: that is what
the run's retention takes first. Checkpoints of branches that the run has left are not exported. The run is only read,
never locked or waited for: a checkpoint that goes while it is exported is passed over. What is there already is
skipped, so the same command goes on after any end. README.md and the title of the commit on the Hub hold a hash of the
state: where a run was taken back and trained anew, a folder of that name from before is refused, a branch gets a
further commit. On the Hub, main holds the newest.
Costs: as hf_export.py for each checkpoint; two requests to the Hub for one that is there.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

from lit_gpt.checkpoint.checkpoint import RUN, Checkpoint, DamagedCheckpoint, newest_first, verified
from lit_gpt.checkpoint.history import left_behind
from lit_gpt.cli import BadInput
from lit_gpt.export.hf_export import Form, config_facts, export, open_tokenizer, require_shape
from lit_gpt.export.hub_repository import MAIN, HubRepository
from lit_gpt.export.model_card import tells_of
from lit_gpt.export.parity import Twin
from lit_gpt.files import read_json

log = logging.getLogger(__name__)

_UNITS = ("", "K", "M", "B", "T")
_STEP_CHARS = len("step-00000000")
"""Of a revision's name: their fixed width makes them an order."""


class Target(NamedTuple):
    """What is made of a checkpoint, and where it goes."""

    destination: Path
    """Folder of the exported folders."""
    form: Form
    license: str
    tokenizer_path: Path | None = None
    """None: the run's own."""
    model_name: str | None = None
    """The registered model that each checkpoint must be, if one is named."""
    hub: HubRepository | None = None
    remove_uploaded: bool = False
    """Remove a folder once its branch is on the Hub."""


def revision_name(step: int, tokens: int) -> str:
    """The name of a checkpoint's folder and branch, tokens to three digits."""
    power = next(power for power in range(len(_UNITS)) if round(tokens / 1000**power) < 1000)
    return f"step-{step:08d}-tokens-{tokens / 1000**power:.3g}{_UNITS[power]}"


class RunExport:
    """The export of the run in `run_dir`; remembers what it has dealt with."""

    def __init__(self, run_dir: Path, target: Target, twin: Twin) -> None:
        if not run_dir.is_dir():
            raise BadInput(f"--run_dir {run_dir}: no such folder")
        self._run_dir, self._target, self._twin = run_dir, target, twin
        self._seen: set[str] = set()
        self.damaged: list[str] = []
        """Names of the checkpoints that were passed over because they are damaged."""
        self.run_is_over = False
        """The newest checkpoint that was dealt with is that of the run's last step."""

    def export_new(self) -> int:
        """Deal with the checkpoints that appeared since the last call; their number."""
        others = left_behind(self._run_dir)
        new = [path for path in newest_first(self._run_dir)[::-1] if path.name not in self._seen and path not in others]
        for path in new:
            self._deal_with(path, newest=path is new[-1])
            self._seen.add(path.name)
        return len(new)

    def _deal_with(self, path: Path, *, newest: bool) -> None:
        try:
            checkpoint = Checkpoint(path, read_json(path / RUN))
        except BadInput as error:
            self._pass_over(path, error)
            return
        last_step = checkpoint.facts.get("settings", {}).get("max_steps")
        revision = revision_name(checkpoint.step, checkpoint.facts["tokens"])
        try:
            title = f"{revision} {checkpoint.state_xxh3}"
        except DamagedCheckpoint as error:
            self._pass_over(path, error)
            return
        branches = self._missing_branches(revision, title, newest=newest)
        if self._target.hub is not None and not branches:
            log.info("%s is on the Hub already", revision)
        elif (folder := self._folder(checkpoint, revision)) is not None and self._target.hub is not None:
            for branch in branches:
                self._target.hub.push(folder, title, branch)
                log.info("uploaded %s to %s, branch %s", revision, self._target.hub.name, branch)
            if self._target.remove_uploaded:
                shutil.rmtree(folder)
        self.run_is_over = checkpoint.step == last_step

    def _missing_branches(self, revision: str, title: str, *, newest: bool) -> list[str]:
        """The branches that get a commit with `title`: the revision's own, and main unless that holds a later step."""
        hub = self._target.hub
        if hub is None:
            return []
        branches = [revision] if hub.title(revision) != title else []
        if newest:
            held = hub.title(MAIN) or ""
            later = held.startswith("step-") and held[:_STEP_CHARS] > title[:_STEP_CHARS]
            if held != title and not later:
                branches.append(MAIN)
        return branches

    def _folder(self, checkpoint: Checkpoint, revision: str) -> Path | None:
        """The exported folder, made unless it is there; None if the checkpoint cannot be exported any more."""
        target, folder = self._target, self._target.destination / revision
        try:
            if folder.exists():
                tokenizer = open_tokenizer(checkpoint, target.tokenizer_path)
                if read_json(folder / "config.json") != config_facts(checkpoint.config, tokenizer, target.form):
                    raise BadInput(
                        f"{folder} was exported otherwise than is asked for now: remove it, or export elsewhere"
                    )
                if not tells_of(folder, checkpoint):
                    raise BadInput(
                        f"{folder} was exported from another state of the run, by its README.md: remove it, or export "
                        "elsewhere"
                    )
                log.info("%s is there already", folder)
                return folder
            whole = verified(checkpoint.path)
            require_shape(whole, target.model_name)
            tokenizer = open_tokenizer(whole, target.tokenizer_path)
            parity = export(whole, tokenizer, folder, target.form, self._twin, target.license)
        except DamagedCheckpoint as error:
            self._pass_over(checkpoint.path, error)
            return None
        except Exception as error:
            if checkpoint.path.exists():
                raise
            self._pass_over(checkpoint.path, error)
            return None
        log.info("published %s; logits agree: %s", folder, parity)
        return folder

    def _pass_over(self, path: Path, error: Exception) -> None:
        if path.exists():
            self.damaged.append(path.name)
            log.warning("passing over %s: %s", path.name, error)
        else:
            log.warning("passing over %s: it was removed meanwhile (keep_last_checkpoints of the run)", path.name)
