"""What a run is made of: found and checked before any process starts, any model is built or any file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gpt.checkpoint.memory import NodeMemory, make_folder
from lit_gpt.checkpoint.record import Checkpoint
from lit_gpt.cli import BadInput
from lit_gpt.config import IGNORE_INDEX, Config
from lit_gpt.data.loader import PackedDataset, check_batch_sizes
from lit_gpt.data.row_reader import open_sources
from lit_gpt.data.settings import DataSettings
from lit_gpt.data.shard_cache import ShardCache, refuse_foreign
from lit_gpt.data.token_store import TokenStore
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.datapoints import run_folder
from lit_gpt.datapoints.attempts import Mark
from lit_gpt.datapoints.log import FOLDER, DatapointLog
from lit_gpt.launch.job import node
from lit_gpt.launch.world import World, default_run_dir, find_world
from lit_gpt.train.memory_plan import checkpoint_bytes
from lit_gpt.train.sampling import Prompts, open_prompts
from lit_gpt.train.settings import Settings


class RunInputs(NamedTuple):
    """Model shape, data, run folder and processes, which fit together."""

    config: Config
    train: tuple[TokenStore, ...]
    weights: list[float] | None
    """Of the training sources; None: each source weighs as much as its size."""
    val: TokenStore | None
    run_dir: Path
    world: World
    prompts: Prompts | None
    """What samples continue; None without samples."""
    memory_dir: Path | None
    """This node's folder for checkpoints in its memory; None without them."""


def open_inputs(settings: Settings) -> RunInputs:
    """Find and check what a run needs; raises BadInput for what is missing or does not fit together.

    settings: as asked for; they have passed `check`.
    """
    world = find_world(settings)
    settings.shards(world.devices, world.size)  # refuses a group that does not divide the processes
    check_batch_sizes(settings.global_batch_size, settings.micro_batch_size, world.size)
    if settings.cache_dir:
        refuse_foreign(Path(settings.cache_dir))
    train, weights = open_sources(settings.train_sources)
    config = settings.config_for(train[0].vocab_size)
    val = TokenStore.open(settings.val_data_dir) if settings.val_data_dir else None
    _require_one_tokenizer(settings, [*train, *([val] if val else [])])
    _require_targets(settings, train, val, config.block_size)
    prompts = open_prompts(settings, settings.tokenizer_path, config.block_size, add_bos=train[0].add_bos)
    run_dir = Path(settings.out_dir or default_run_dir(settings.model_name))
    run_folder.create(run_dir)
    memory_dir = None
    if settings.memory_checkpoint_dir:
        share = settings.share_of_node(world.devices, world.size)
        size = round(share * checkpoint_bytes(config, settings))
        memory_dir = make_folder(settings.memory_checkpoint_dir, run_dir, node(), size)
    return RunInputs(config, tuple(train), weights, val, run_dir, world, prompts, memory_dir)


def slot_facts(dataset: PackedDataset, settings: DataSettings) -> dict[str, Any]:
    """What the meaning of a slot of the run depends on, as JSON."""
    return {
        **dataset.slot_facts(),
        "global_batch_size": settings.global_batch_size,
        "cross_document_attention": settings.cross_document_attention,
    }


def open_datapoint_log(
    inputs: RunInputs,
    settings: DataSettings,
    facts: Mapping[str, Any],
    start: Checkpoint | None,
    left_out: Sequence[tuple[int, int]],
    *,
    data_from_step: int,
    changed_settings: Mapping[str, Any],
    allow_changed_data: bool,
) -> DatapointLog:
    """The datapoint log of the steps after `start` (None: from the first).

    facts: the slot facts; left_out: the ranges of slots of all rollbacks; changed_settings: those that differ from the
    checkpoint's (run_folder.changed_settings). Raises BadInput if the log is not the checkpoint's, unless
    allow_changed_data.
    """
    details = {
        "world_size": inputs.world.size,
        "micro_batch_size": settings.micro_batch_size,
        "train_data_dir": [str(store.path.resolve()) for store in inputs.train],
        "val_dataset_id": inputs.val.dataset_id if inputs.val else None,
        "tokenizer_path": settings.tokenizer_path,
        "left_out": left_out,
        "resumed_from": str(start.path.resolve()) if start else None,
        "data_from_step": data_from_step,
        "changed_settings": changed_settings,
    }
    own_folders = [folder.resolve() for folder in (inputs.run_dir, inputs.memory_dir) if folder is not None]
    parent = start.facts.get("datapoint_log") if start else None  # an imported model has none
    return DatapointLog.open(
        inputs.run_dir / FOLDER,
        facts,
        parent=Mark(**parent) if parent else None,
        details=details,
        foreign=start is not None and start.path.resolve().parent not in own_folders,
        allow_changed_data=allow_changed_data,
    )


def _require_one_tokenizer(settings: DataSettings, stores: list[TokenStore]) -> None:
    first = stores[0]
    for store in stores[1:]:
        if store.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise BadInput(
                f"{store.path} and {first.path} were made with different tokenizers: prepare both with the same"
            )
        if store.add_bos != first.add_bos:
            with_bos, without = (store, first) if store.add_bos else (first, store)
            raise BadInput(
                f"documents begin with BOS in {with_bos.path}, but not in {without.path}: prepare both with --add_bos, "
                "or both without"
            )
    if settings.tokenizer_path:
        fingerprint = Tokenizer.from_folder(settings.tokenizer_path).fingerprint
        if fingerprint != first.tokenizer_fingerprint:
            raise BadInput(
                f"--tokenizer_path {settings.tokenizer_path} (fingerprint {fingerprint}) is not the tokenizer that "
                f"{first.path} was made with ({first.tokenizer_fingerprint})"
            )


def _require_targets(settings: Settings, train: Sequence[TokenStore], val: TokenStore | None, block_size: int) -> None:
    """Raise BadInput for a split, or rows of it that are to validate, in which no token is a target."""
    across = settings.cross_document_attention
    for store in train:
        if not store.targets(cross_document_attention=across and settings.packing == "window"):
            raise BadInput(
                f"{store.path}: no token is a target ({store.tokens} tokens in {store.documents} documents, and a "
                "document's first is none): give documents of two tokens or more"
            )
    if val is None or (val.targets(cross_document_attention=across) and _has_target(settings, val, block_size)):
        return
    which = f"its first {settings.eval_max_rows} rows (--eval_max_rows)" if settings.eval_max_rows else "it"
    raise BadInput(
        f"--val_data_dir {val.path}: no token of {which} is a target ({val.tokens} tokens in {val.documents} "
        "documents, and a document's first is none): give another split, or leave it out"
    )


def _has_target(settings: Settings, val: TokenStore, block_size: int) -> bool:
    """Whether the rows that a validation reads have a target; reads up to the first one, which is at once."""
    reader = PackedDataset(val, block_size, settings.seed, cross_document_attention=settings.cross_document_attention)
    rows = min(settings.eval_max_rows or reader.rows_per_epoch, reader.rows_per_epoch)
    found = any((reader.read(np.array([slot]))[0].targets != IGNORE_INDEX).any() for slot in range(rows))
    reader.close()
    return found


def node_memory(inputs: RunInputs, settings: Settings, first_rank: int) -> NodeMemory | None:
    """The checkpoints in this node's memory, if the settings ask for them; first_rank: of the node. A collective."""
    if inputs.memory_dir is None:
        return None
    world = inputs.world
    ranks, share = range(first_rank, first_rank + world.devices), settings.share_of_node(world.devices, world.size)
    return NodeMemory(inputs.memory_dir, ranks, share=share, timeout=settings.group_timeout)


def open_cache(settings: DataSettings) -> ShardCache | None:
    """The node's shard cache, if the settings name one."""
    return ShardCache(Path(settings.cache_dir), settings.cache_bytes) if settings.cache_dir else None


def training_rows(inputs: RunInputs, settings: DataSettings, cache: ShardCache | None) -> PackedDataset:
    """The rows that the run trains on."""
    return PackedDataset(
        inputs.train,
        inputs.config.block_size,
        settings.seed,
        weights=inputs.weights,
        packing=settings.packing,
        cross_document_attention=settings.cross_document_attention,
        max_epochs=settings.max_epochs,
        cache=cache,
        index_dir=Path(settings.cache_dir) / "packing" if settings.cache_dir else None,
    )


def validation_rows(inputs: RunInputs, settings: DataSettings) -> PackedDataset | None:
    """The rows of the validation split, or None: always in the packing `window`, which counts every token once."""
    if inputs.val is None:
        return None
    return PackedDataset(
        inputs.val,
        inputs.config.block_size,
        settings.seed,
        cross_document_attention=settings.cross_document_attention,
    )
