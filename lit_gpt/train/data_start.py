"""Where the data of a run goes on after a checkpoint: its facts are compared with the data of now, wherever it is.

A checkpoint's slot means something only together with its slot facts: stores, mixture, seed, packing, block size,
batch. If one of them has changed, the run is refused, or told to go on by one of two flags:

    --allow_changed_data true   at the same slot, in the changed data (a rebuilt store, another batch size)
    --new_data true             at slot 0 of the new data, with the trained state: continued pretraining

An imported model has seen no data here, so it has no facts and just begins.
Invariants: --new_data does nothing where nothing has changed, so a job that is requeued with it goes on. `from_step`
says after which step the present data began; checkpoints and the datapoint log's attempts hold it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_gpt.checkpoint.checkpoint import Checkpoint
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import Mark, read_attempts
from lit_gpt.datapoints.log import FOLDER, OVERRIDE
from lit_gpt.datapoints.settings import DatapointSettings

log = logging.getLogger(__name__)

NEW_DATA = "--new_data"
_SETTINGS_FACTS = ("seed", "packing", "global_batch_size", "cross_document_attention")


class DataStart(NamedTuple):
    """Where the data goes on."""

    slot: int
    from_step: int
    """The step after which the data that is read now began: 0, unless --new_data changed it."""
    anew: bool
    """Whether other data begins here."""
    changed: dict[str, list[Any]]
    """Slot facts that differ: name -> [as saved, now]."""


def data_start(
    checkpoint: Checkpoint, slot_facts: Mapping[str, Any], tokenizer: str, settings: DatapointSettings
) -> DataStart:
    """Where the data of now (its slot facts, and its tokenizer's fingerprint) goes on after the checkpoint.

    Raises BadInput if the data has changed and no flag says what that means.
    """
    facts = checkpoint.facts
    before = saved_slot_facts(checkpoint)
    _require_tokenizer(checkpoint, tokenizer, settings, imported=not before)
    changed = {name: [value, slot_facts.get(name)] for name, value in before.items() if value != slot_facts.get(name)}
    if not changed:
        return DataStart(facts["slot"], facts.get("data_from_step", 0), False, {})
    if settings.new_data:
        return DataStart(0, checkpoint.step, True, changed)
    if not settings.allow_changed_data:
        raise BadInput(
            f"the data has changed since {checkpoint.path} was saved: {told(changed)}. Restore it; or pass {NEW_DATA} "
            f"true to begin this data at its start with the trained state, or {OVERRIDE} true to go on at row "
            f"{facts['slot']} of it"
        )
    return DataStart(facts["slot"], facts.get("data_from_step", 0), False, changed)


def told(changed: Mapping[str, list[Any]]) -> str:
    """The differences as text; ids of data sets by their first digits."""
    return "; ".join(f"{name} was {_short(was)} and is {_short(now)}" for name, (was, now) in changed.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 32 else str(value)


def saved_slot_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The slot facts that the checkpoint was saved with, as far as it holds them; none of an imported model.

    Version 0.1.0 and before wrote them only to the datapoint log beside the checkpoint; most follow from its settings.
    """
    facts = checkpoint.facts
    if "slot_facts" in facts:
        return dict(facts["slot_facts"])
    mark = facts.get("datapoint_log")
    if not mark:
        return {}
    derived = {name: facts["settings"][name] for name in _SETTINGS_FACTS if name in facts["settings"]}
    derived |= {"datasets": facts["dataset_id"], "block_size": facts["model"]["block_size"]}
    attempts = read_attempts(checkpoint.path.parent / FOLDER)
    number = Mark(**mark).attempt
    if number < len(attempts) and attempts[number].facts.get("datasets") == derived["datasets"]:
        return {**attempts[number].facts, **derived}
    return derived


def _require_tokenizer(checkpoint: Checkpoint, tokenizer: str, settings: DatapointSettings, *, imported: bool) -> None:
    """Raise BadInput, or warn if a flag or an import leaves it open, for data of another tokenizer."""
    saved = checkpoint.facts.get("tokenizer_fingerprint")
    if saved is None or saved == tokenizer:
        return
    said = f"{checkpoint.path} is of tokenizer {_short(saved)}, the data was made with {_short(tokenizer)}"
    if not (imported or settings.allow_changed_data):
        raise BadInput(f"{said}: the model would read other words. Prepare the data with the model's tokenizer")
    log.warning("%s: the model may read other words", said)
