"""How a running training saves: the state is copied to host memory and written while training continues.

A save has two halves. The training loop waits for the first: it checks that the weights are finite and copies the state
to host memory, where later steps cannot change it. A thread does the second: write, sync, hash, publish, prune. A save
that must be over when it returns (at a stop signal, at the end of the run, with async_save off) does both
halves in the training loop, without the copy.

Invariants: one save runs at a time, the next waits for it; older checkpoints are removed only after a newer one is
published; the ranks agree on the outcome, over a gloo group of their own, so that none waits for a rank that failed. If
weights are not finite, or there is no room, nothing is saved: an error is logged, `failure` says why, and training and
older checkpoints are untouched. Any other failure is raised by the next `wait`.
Costs: one copy of this rank's state in host memory, page-locked with a GPU and kept for the next save; for a full
checkpoint of several processes, the whole state on rank 0 during a save.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from lit_gpt.checkpoint import checkpoint, full_state, history, sharded_state
from lit_gpt.checkpoint.host_copy import HostCopy
from lit_gpt.checkpoint.memory import NodeMemory
from lit_gpt.checkpoint.record import FULL, SHARDED, checkpoint_name
from lit_gpt.checkpoint.together import LEAST_TIMEOUT, each_or_raise, no_room
from lit_gpt.checkpoint.waiting import SaveProgress
from lit_gpt.cli import BadInput
from lit_gpt.files import discard
from lit_gpt.launch.tally import tally

log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Where a checkpoint goes: the run folder, or the memory of this rank's node."""

    folder: Path
    full: bool
    seals: bool
    """Whether this rank makes and publishes the checkpoint."""
    group: dist.ProcessGroup | None
    """The ranks that write it."""
    make_way: Callable[[str], None]
    """Removes what may go before a checkpoint of this name is written."""
    prune: Callable[[int], None]
    """Removes what may go after that of this step is published."""
    share: float = 1.0
    """Of the state, that is written there."""


class CheckpointSaver:
    """The saves of one run. Each rank makes one, and all call `save`, `wait` and `close` in the same order.

    full: one state.pth (state_dict_type full), else a part per rank. overlap: write in a thread (async_save).
    keep_last, keep_every_steps: see history.prune. timeout: of the ranks' group, or LEAST_TIMEOUT if that is longer.
    memory: where saves to node memory go, if any do.
    """

    def __init__(
        self,
        run_dir: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        full: bool,
        overlap: bool,
        keep_last: int,
        keep_every_steps: int = 0,
        timeout: timedelta = LEAST_TIMEOUT,
        memory: NodeMemory | None = None,
    ) -> None:
        self.failure: str | None = None
        """Why the newest save failed; None if it is published or still being written."""
        self.longest_s = 0.0
        """Seconds of the longest save so far, from call to publication."""
        self._run_dir, self._model, self._optimizer = run_dir, model, optimizer
        self._overlap, self._memory = overlap, memory
        timeout = max(timeout, LEAST_TIMEOUT)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._rank = dist.get_rank() if self._group is not None else 0
        prune = partial(history.prune, run_dir, keep_last=keep_last, keep_every_steps=keep_every_steps)
        self._in_run_dir = _Place(run_dir, full, self._rank == 0, self._group, lambda _: None, prune)
        device = next(model.parameters()).device
        on_gpu = device.type == "cuda"
        self._host_copy = HostCopy(from_gpu=on_gpu)
        # a new thread's current device is GPU 0: without this, every rank would create a context there
        use_device = partial(torch.cuda.set_device, device) if on_gpu else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=use_device)
        self._running: Future[None] | None = None
        self._prepared: Future[None] | None = None
        self._progress = SaveProgress(self._state_bytes())

    def prepare(self) -> None:
        """Begin to allocate the host memory of copies, after the first update; later calls do nothing.

        It is page-locked beside training, in the thread that writes; else training would wait for it at the first save.
        """
        copies = self._memory is not None or not self._gathers(self._in_run_dir)
        if self._prepared is None and self._overlap and copies and self._host_copy.from_gpu:
            full = self._in_run_dir.full and self._group is None
            state = checkpoint.training_state(self._model, self._optimizer, full=full, to_host=False)
            self._prepared = self._thread.submit(self._host_copy.prepare, state)

    def save(self, facts: dict[str, Any], *, wait: bool = False, in_memory: bool = False) -> None:
        """Save the state after `facts["step"]` updates; with wait=True, or without overlap, it is over on return.

        `facts` must be JSON; with the model's shape added, rank 0 writes them to run.json. in_memory: to node memory.
        Raises as `wait` does.
        """
        began = time.monotonic()
        self.wait()
        self.failure = None
        place = self._in_run_dir
        if in_memory:
            assert self._memory is not None
            place, facts = self._place_in(self._memory), self._memory.facts(facts, self._group)
        final = place.folder / checkpoint_name(facts["step"])
        self._progress.begin(checkpoint.temporary_path(final), final.name)
        facts = {**facts, "model": asdict(checkpoint.unwrapped(self._model).config)}
        if not self._weights_are_finite():
            self._give_up(facts["step"], "the weights are not finite numbers")
        elif self._overlap and not wait:
            state = self._staged_state(place)
            self._running = self._thread.submit(self._write, place, state, facts, began, time.monotonic() - began)
        else:
            state = checkpoint.training_state(self._model, self._optimizer, full=place.full, to_host=place.full)
            with self._progress.told(by_this_rank=self._rank == 0):
                self._write(place, state, facts, began, None)

    @staticmethod
    def _place_in(memory: NodeMemory) -> _Place:
        return _Place(memory.folder, False, memory.seals, memory.group, memory.make_way, memory.keep_only, memory.share)

    def wait(self) -> None:
        """Return when no save is running; RuntimeError if one failed for another reason than lack of room."""
        if (error := self._outcome()) is not None:
            raise RuntimeError("a checkpoint could not be written") from error

    def _outcome(self) -> BaseException | None:
        """Wait for a running save; its error."""
        running, self._running = self._running, None
        if running is None:
            return None
        with self._progress.told(by_this_rank=self._rank == 0):
            return running.exception()

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._running is not None and not self._running.done()

    @property
    def broken(self) -> bool:
        """Whether `wait` is going to raise; needs no other rank."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def settle(self) -> None:
        """Return when no save is being written any more. Any thread may call it."""
        if (running := self._running) is not None:
            futures.wait([running])

    def close(self) -> None:
        """Wait for a running save; its error is logged, so as not to hide the one that may be ending the run."""
        if (error := self._outcome()) is not None:
            log.error("a checkpoint could not be written", exc_info=error)
        self._host_copy.close_soon()
        self._thread.shutdown()
        self._host_copy.close()

    def log_room(self) -> None:
        """Log how many checkpoints fit into the run folder's file system; warn if there is no room for two."""
        if self._rank == 0:
            size, free = self._state_bytes(), shutil.disk_usage(self._run_dir).free
            log.log(
                logging.WARNING if free < 2 * size else logging.INFO,
                "a checkpoint takes about %.2f GB; %.2f GB are free in %s: room for %d",
                size / 1e9, free / 1e9, self._run_dir, free // size,
            )  # fmt: skip

    # What the training loop waits for

    def _weights_are_finite(self) -> bool:
        """Whether all ranks' weights are finite, judged by the largest absolute value, which is NaN if any is."""
        local = [shard for p in self._model.parameters() if (shard := _local(p.detach())).numel()]
        largest = torch.nn.utils.get_total_norm(local, torch.inf) if local else torch.zeros(())
        return tally([not torch.isfinite(largest)], group=self._group) == [0]

    def _gathers(self, place: _Place) -> bool:
        """Whether rank 0 collects the whole state, instead of a copy of its own part on each rank."""
        return place.full and self._group is not None

    def _staged_state(self, place: _Place) -> dict[str, Any]:
        gathers = self._gathers(place)
        state = checkpoint.training_state(self._model, self._optimizer, full=place.full, to_host=gathers)
        if not gathers:
            if self._prepared is not None:
                self._prepared.result()
            return self._host_copy.of(state)
        # Gathering has copied sharded tensors; the others (step counters) are still the optimizer's own.
        tensors = [*self._model.parameters(), *(t for s in self._optimizer.state.values() for t in s.values())]
        live = {_address(t) for t in tensors if isinstance(t, Tensor)}
        return tree_map_only(Tensor, lambda t: t.clone() if _address(t) in live else t, state)

    def _state_bytes(self) -> int:
        """Size of a checkpoint: each weight and, in its precision, Muon's momentum or Adam's two moments of it."""
        groups = self._optimizer.param_groups
        sizes = ((2 if "momentum" in group else 3, weight) for group in groups for weight in group["params"])
        return sum(numbers * weight.numel() * weight.element_size() for numbers, weight in sizes)

    # What a thread may do

    def _write(
        self, place: _Place, state: dict[str, Any], facts: dict[str, Any], began: float, waited_s: float | None
    ) -> None:
        final = place.folder / checkpoint_name(facts["step"])
        temporary = checkpoint.temporary_path(final)
        try:
            self._seal(place, lambda: self._make_room(place, facts["step"], temporary))
            if place.full:
                self._seal(place, lambda: full_state.write(state, temporary / FULL))
            else:
                each_or_raise(lambda: sharded_state.write(state, temporary / SHARDED, place.group), self._group)
            self._progress.written()
            self._seal(place, lambda: checkpoint.seal(temporary, final, facts))
        except (OSError, CheckpointException) as error:
            reason = no_room(error)
            if reason is None:
                raise
            self._seal(place, lambda: shutil.rmtree(temporary, ignore_errors=True))
            self._give_up(facts["step"], reason)
            return
        seconds = time.monotonic() - began
        self.longest_s = max(self.longest_s, seconds)
        if self._rank == 0:
            log.info("saved %s in %.2f s, training waited %.2f s", final, seconds, waited_s or seconds)
        if place.seals:
            self._remove_old(place, facts["step"])

    def _make_room(self, place: _Place, step: int, temporary: Path) -> None:
        """Make an empty folder; OSError if the file system lacks the room by now, as others write there too."""
        place.make_way(checkpoint_name(step))
        discard(temporary)  # left over by a save that was killed
        size, free = round(place.share * self._state_bytes()), shutil.disk_usage(place.folder).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size} bytes needed, {free} free")
        temporary.mkdir(parents=True)

    def _seal(self, place: _Place, call: Callable[[], None]) -> None:
        """Make the call on the ranks that seal; if it fails on one, all ranks raise."""
        each_or_raise(call if place.seals else lambda: None, self._group)

    def _remove_old(self, place: _Place, newest_step: int) -> None:
        try:
            place.prune(newest_step)
        except (OSError, BadInput) as error:  # the new checkpoint is published nevertheless
            log.error("old checkpoints could not be removed: %s", error)

    def _give_up(self, step: int, reason: str) -> None:
        self.failure = reason
        if self._rank == 0:
            log.error("the checkpoint of step %d was NOT saved: %s. Older ones are untouched", step, reason)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _address(tensor: Tensor) -> int:
    return _local(tensor).untyped_storage().data_ptr()
