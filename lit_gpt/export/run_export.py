"""Export every checkpoint of a run: each to its own Hugging Face folder and, if asked, to a branch on the Hub.

A folder and its branch are named by step and tokens: step-00010000-tokens-21B. Checkpoints are exported oldest first,
in the order in which the run prunes them; those of branches that the run has left are not exported. The run is only
read, never locked or waited for: a checkpoint that is pruned during its export is passed over. What is exported already
is skipped, so the same command continues after any interruption. README.md and the title of the commit on the Hub hold
a hash of the state: where a run went back and trained a step again, the step's older folder is refused, and its branch
gets a further commit. On the Hub, main holds the newest.
Costs: those of hf_export.py for each checkpoint; two requests for one that is on the Hub already.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from lit_gpt.checkpoint.checkpoint import newest_first, verified
from lit_gpt.checkpoint.history import left_behind
from lit_gpt.checkpoint.record import Checkpoint, DamagedCheckpoint, described
from lit_gpt.cli import BadInput
from lit_gpt.export.hf_export import WeightFormat, config_fields, export, open_tokenizer, require_shape
from lit_gpt.export.hub_repository import MAIN, HubRepository
from lit_gpt.export.model_card import tells_of
from lit_gpt.export.parity import Reference
from lit_gpt.files import read_json

log = logging.getLogger(__name__)

_UNITS = ("", "K", "M", "B", "T")
_STEP_CHARS = len("step-00000000")
"""The part of a revision's name that sorts by step."""


class ExportOptions(NamedTuple):
    """How each checkpoint is exported, and to where."""

    destination: Path
    """Folder for the exported folders."""
    format: WeightFormat
    license: str
    tokenizer_path: Path | None = None
    """Tokenizer folder; None: the run's own."""
    model_name: str | None = None
    """The registered model that each checkpoint must be; None: any."""
    hub: HubRepository | None = None
    remove_uploaded: bool = False
    """Remove a folder once its branch is on the Hub."""
    add_bos: bool | None = None
    """See hf_export.export."""
    record: Literal["none", "steps", "documents"] = "steps"
    """See hf_export.export."""


def revision_name(step: int, tokens: int) -> str:
    """The name of a checkpoint's folder and branch; tokens to three digits."""
    power = next(power for power in range(len(_UNITS)) if round(tokens / 1000**power) < 1000)
    return f"step-{step:08d}-tokens-{tokens / 1000**power:.3g}{_UNITS[power]}"


class RunExport:
    """The export of the run in `run_dir`; remembers which checkpoints it has handled."""

    def __init__(self, run_dir: Path, options: ExportOptions, reference: Reference) -> None:
        if not run_dir.is_dir():
            raise BadInput(f"--run_dir {run_dir}: no such folder")
        self._run_dir, self._options, self._reference = run_dir, options, reference
        self._seen: set[str] = set()
        self.damaged: list[str] = []
        """Names of the damaged checkpoints that were passed over."""
        self.run_is_over = False
        """Whether the newest handled checkpoint is of the run's last step."""

    def export_new(self) -> int:
        """Export the checkpoints that have appeared since the last call; returns their number.

        Raises BadInput if an existing folder is of another state or other options, UploadFailed if the Hub fails.
        """
        others = left_behind(self._run_dir)
        new = [path for path in newest_first(self._run_dir)[::-1] if path.name not in self._seen and path not in others]
        for path in new:
            self._export_one(path, newest=path is new[-1])
            self._seen.add(path.name)
        return len(new)

    def _export_one(self, path: Path, *, newest: bool) -> None:
        try:
            checkpoint = described(path)
            revision = revision_name(checkpoint.step, checkpoint.facts["tokens"])
            title = f"{revision} {checkpoint.state_xxh3}"
        except DamagedCheckpoint as error:
            self._pass_over(path, error)
            return
        last_step = checkpoint.facts.get("resolved", {}).get("max_steps", checkpoint.facts["settings"].get("max_steps"))
        branches = self._missing_branches(revision, title, newest=newest)
        if self._options.hub is not None and not branches:
            log.info("%s is on the Hub already", revision)
        elif (folder := self._folder(checkpoint, revision)) is not None and self._options.hub is not None:
            for branch in branches:
                self._options.hub.push(folder, title, branch)
                log.info("uploaded %s to %s, branch %s", revision, self._options.hub.name, branch)
            if self._options.remove_uploaded:
                shutil.rmtree(folder)
        self.run_is_over = checkpoint.step == last_step

    def _missing_branches(self, revision: str, title: str, *, newest: bool) -> list[str]:
        """The branches that need a commit: the revision's own and, for the newest, main if it holds no later step."""
        hub = self._options.hub
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
        """The exported folder, made if missing; None if the checkpoint is damaged or was removed."""
        options, folder = self._options, self._options.destination / revision
        try:
            if folder.exists():
                tokenizer = open_tokenizer(checkpoint, options.tokenizer_path)
                # a folder of an earlier version names no padding
                stated = {"pad_token_id": tokenizer.eos_id, **read_json(folder / "config.json")}
                if stated != config_fields(checkpoint.config, tokenizer, options.format):
                    raise BadInput(f"{folder} was exported with other options than now: remove it, or export elsewhere")
                if not tells_of(folder, checkpoint):
                    raise BadInput(
                        f"{folder} was exported from another state of the run, by its README.md: remove it, or export "
                        "elsewhere"
                    )
                log.info("%s is there already", folder)
                return folder
            whole = verified(checkpoint.path)
            require_shape(whole, options.model_name)
            tokenizer = open_tokenizer(whole, options.tokenizer_path)
            parity = export(
                whole,
                tokenizer,
                folder,
                options.format,
                self._reference,
                options.license,
                options.add_bos,
                options.record,
            )
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
