"""Checkpoints in the memory of the nodes (--memory_checkpoint_dir, such as /dev/shm), more often than on disk.

They are checkpoints as any other (checkpoint.py), but for two things. Each node has one of its own, with the parts of
its ranks, whatever --state_dict_type is; nothing is copied between nodes. And only the newest is kept, beside the one
that is being written. A process that is killed, or a job step that ends, leaves them there; the end of the job, and a
node that is replaced, do not. Another number of ranks finds its parts where one node holds the whole state.

    DIR/<run folder's name>-<hash of its path>/<node>/iter-XXXXXXXX-ckpt.pth

Invariants: a node removes its older one after all nodes have published theirs, so there always is a step that all nodes
have. --resume auto takes it if it is newer than the run folder's newest, of the branch trained last, of one save on all
nodes, verified, and if each rank finds its own parts on its node; the ranks agree on that. Else one line says why not,
and the run folder's is taken. A run that ends with its last checkpoint in the run folder removes them.
Costs: twice a node's part of a checkpoint in its memory. Verifying reads that part, all nodes at once.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from torch import Tensor

from lit_gpt.checkpoint import sharded_state
from lit_gpt.checkpoint.checkpoint import is_whole, newest_first, remove, verified
from lit_gpt.checkpoint.record import SAVE, SHARDED, Checkpoint, DamagedCheckpoint, checkpoint_name, described
from lit_gpt.checkpoint.together import LEAST_TIMEOUT, first_failure
from lit_gpt.checkpoint.torch_file import MalformedState
from lit_gpt.cli import BadInput
from lit_gpt.files import discard
from lit_gpt.launch.tally import tally

log = logging.getLogger(__name__)


def make_folder(directory: str, run_dir: Path, node: str, state_bytes: int) -> Path:
    """This node's folder for the run in `run_dir`; raises BadInput where it cannot hold two states of `state_bytes`.

    directory: --memory_checkpoint_dir. All ranks of the node may call it at once.
    """
    top, run_dir = Path(directory).resolve(), run_dir.resolve()
    flag = f"--memory_checkpoint_dir {directory}"
    if run_dir in (top, *top.parents):
        raise BadInput(f"{flag} is inside the run folder {run_dir}: name a folder in the node's memory, as /dev/shm")
    run = top / f"{run_dir.name}-{xxhash.xxh3_64_hexdigest(str(run_dir).encode())[:8]}"
    folder = run / node
    try:
        top.mkdir(parents=True, exist_ok=True)
        run.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(exist_ok=True)
        if run.lstat().st_uid != os.getuid() or run.is_symlink():
            raise BadInput(f"{flag}: {run} is another user's. Name another folder")
        free = shutil.disk_usage(folder).free + _bytes(folder)
    except OSError as error:
        raise BadInput(f"{flag}: it cannot be written ({error.strerror}). Name another folder") from None
    if free < 2 * state_bytes:
        raise BadInput(
            f"{flag}: {free / 1e9:.2f} GB are free there, and a node's part of two checkpoints takes "
            f"{2 * state_bytes / 1e9:.2f} GB. Use more nodes, a larger file system, or leave the flag out"
        )
    return folder


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


class NodeMemory:
    """A run's checkpoints in the memory of this rank's node; all ranks make one, and make the same calls."""

    def __init__(self, folder: Path, ranks: range, *, share: float, timeout: timedelta) -> None:
        """ranks: those of this node; share: of the whole state, that the node's ranks hold; timeout: of their group, or
        LEAST_TIMEOUT."""
        self.folder, self.share = folder, share
        self.group: dist.ProcessGroup | None = None
        """This node's ranks."""
        self.seals = True
        """Whether this rank makes and publishes the node's checkpoints."""
        if dist.is_initialized():
            self.seals = dist.get_rank() == ranks[0]
            timeout = max(timeout, LEAST_TIMEOUT)
            self.group = dist.new_group(list(ranks), timeout, backend="gloo", use_local_synchronization=True)

    def facts(self, facts: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
        """Rank 0's facts for run.json on every node, with an id of the save. A collective of the group of all ranks."""
        told = [{**facts, SAVE: secrets.token_hex(7)}]
        if group is not None:
            dist.broadcast_object_list(told, src=0, group=group)
        return told[0]

    def make_way(self, name: str) -> None:
        """Remove what killed saves left, and a checkpoint of this name: it is damaged, or of a branch that was left."""
        if (self.folder / name).exists():
            remove(self.folder / name)
        for left_over in (*self.folder.glob(".saving-iter-*"), *self.folder.glob(".removing-iter-*")):
            discard(left_over)

    def keep_only(self, step: int) -> None:
        """Remove all checkpoints but that of `step`, which all nodes have."""
        for path in newest_first(self.folder):
            if path.name != checkpoint_name(step):
                remove(path)

    def clear(self) -> None:
        """Remove them all: the run has ended, with its last checkpoint in the run folder."""
        if self.seals:
            discard(self.folder)
            with suppress(OSError):  # not a node's memory after all: others lie beside it
                self.folder.parent.rmdir()

    def find(
        self, wanted: Callable[[int], bool], current: Callable[[Checkpoint], bool], weights: Mapping[str, Tensor]
    ) -> Checkpoint | None:
        """The checkpoint to resume, for each rank that of its node; None if there is none, or one line says why not.

        wanted: whether one of this step would be taken; current: whether it is of the branch that was trained last;
        both are asked on rank 0. weights: by name, as this rank holds them. A collective.
        """
        own = next((path for path in newest_first(self.folder) if is_whole(path)), None)
        oldest, newest = _extremes(described(own).step if own else -1)
        if not _extremes(int(_is_zero() and newest >= 0 and wanted(newest)))[1]:
            return None
        found, problem = None, None
        try:
            if oldest >= 0:
                found = self._checked(oldest, weights)
                if _is_zero() and not (wanted(oldest) and current(found)):
                    raise DamagedCheckpoint(f"{found.path} is of a branch that the run has left")
            elif own is None:
                raise DamagedCheckpoint(f"none in {self.folder}")
        except DamagedCheckpoint as error:
            problem = error
        failure = first_failure(problem)
        if failure is None:
            assert found is not None
            first, last = _extremes(int(found.facts[SAVE], 16))
            failure = first_failure(DamagedCheckpoint("the nodes' are of different saves") if first < last else None)
        if failure is None:
            return found
        if _is_zero():
            log.warning("the checkpoints in node memory are not used: rank %d: %s", failure.rank, failure.text)
        return None

    def _checked(self, step: int, weights: Mapping[str, Tensor]) -> Checkpoint:
        """This node's checkpoint of `step`, in which this rank's parts are; the rank that seals verifies it."""
        path = self.folder / checkpoint_name(step)
        found = verified(path, part=True) if self.seals else described(path)
        if SAVE not in found.facts:
            raise DamagedCheckpoint(f"{path} was not saved to node memory")
        try:
            missing = sharded_state.missing_part(weights, path / SHARDED, "model.")
        except (MalformedState, OSError) as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None
        if missing is not None:
            raise DamagedCheckpoint(f"{path} lacks this rank's part of {missing}: the ranks are on other nodes now")
        return found


def _is_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _extremes(number: int) -> tuple[int, int]:
    """The smallest and the largest `number` of all ranks. A collective."""
    smallest, largest = tally([number, -number], "min")
    return smallest, -largest
