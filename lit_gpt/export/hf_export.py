"""Export a checkpoint as a Hugging Face folder, which is published only after every check has passed.

The checks, in order: every file of the checkpoint against its hash; the tokenizer against the run's; the ids of
transformers' tokenizer against ours; the weights, written as a stream and read back, bit for bit; the logits of
transformers' model against ours, both in fp32 with the weights as stored. No GPU is needed; parity.py says what memory.
The program hands in transformers, so that the library does not depend on it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_gpt.checkpoint.checkpoint import model_tensors, verified
from lit_gpt.checkpoint.record import Checkpoint, DamagedCheckpoint
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.data.token_store import MANIFEST, ShardFile, TokenStore
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export.data_record import write_record
from lit_gpt.export.hf_folder import require_hashes, write_weights
from lit_gpt.export.hf_tokenizer import TRICKY_TEXTS, require_same_ids, write_tokenizer
from lit_gpt.export.hf_weights import SHAPE_FIELDS, hf_config, hf_generation_config, hf_shapes, to_hf
from lit_gpt.export.model_card import Card, write_card
from lit_gpt.export.parity import GERMAN_TEXT, SAMPLE_TOKENS, Parity, Reference, compare, our_logits
from lit_gpt.files import publishing_new, write_json

log = logging.getLogger(__name__)


class WeightFormat(NamedTuple):
    """How an exported folder stores the weights."""

    dtype: torch.dtype
    cut_vocabulary: bool
    """Leave out the padding rows of the embedding and of the output projection."""
    max_shard_bytes: int
    """Largest weight file."""

    def vocabulary_rows(self, config: Config) -> int:
        """Rows of the embedding and of the output projection."""
        return config.vocab_size if self.cut_vocabulary else config.padded_vocab_size


def export(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    destination: Path,
    format: WeightFormat,
    reference: Reference,
    license: str,
    add_bos: bool | None = None,
    record: Literal["none", "steps", "documents"] = "none",
) -> Parity:
    """Publish the folder `destination`; if a check fails, raises BadInput and publishes nothing.

    add_bos: whether the training's documents begin with BOS, for a checkpoint that does not say so; None: find out.
    record: what goes with it of the training's record (data_record.py).
    """
    config = checkpoint.config
    rows = format.vocabulary_rows(config)
    shapes = hf_shapes(config, rows)
    sample, add_bos = _sample(checkpoint, tokenizer), adds_bos(checkpoint, add_bos)

    def as_stored() -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.to(format.dtype)) for name, tensor in model_tensors(checkpoint))

    with publishing_new(destination, folder=True) as folder:
        _write_configs(folder, config, tokenizer, format)
        write_tokenizer(tokenizer, folder, block_size=config.block_size, add_bos=add_bos)
        require_same_ids(tokenizer, reference.encoder(folder), (GERMAN_TEXT, *TRICKY_TEXTS), add_bos=add_bos)
        hashes = write_weights(folder, shapes, format.dtype, to_hf(config, as_stored(), rows), format.max_shard_bytes)
        require_hashes(folder, hashes)
        theirs = reference.logits(folder, format.dtype, sample)
        parity = compare(our_logits(config, as_stored(), sample), theirs)
        if record != "none":
            write_record(folder, checkpoint, documents=record == "documents")
        write_card(folder, checkpoint, Card(license, str(format.dtype).removeprefix("torch."), parity))
        return parity


@contextmanager
def temporary_export(
    checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: torch.dtype, reference: Reference, parent: Path | None = None
) -> Iterator[Path]:
    """The checkpoint's export in a folder that is removed at the end; parent: default is the system's for such."""
    with tempfile.TemporaryDirectory(prefix="export-", dir=parent) as scratch:
        folder = Path(scratch) / checkpoint.path.name
        format = WeightFormat(dtype, cut_vocabulary=False, max_shard_bytes=5 * 10**9)
        export(checkpoint, tokenizer, folder, format, reference, "unknown")
        yield folder


def config_fields(config: Config, tokenizer: Tokenizer, format: WeightFormat) -> dict[str, Any]:
    """The content of config.json for a model of `config`, stored in `format`."""
    rows = format.vocabulary_rows(config)
    return hf_config(config, dtype=format.dtype, vocabulary_rows=rows, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)


def _write_configs(folder: Path, config: Config, tokenizer: Tokenizer, format: WeightFormat) -> None:
    write_json(folder / "config.json", config_fields(config, tokenizer, format))
    generation = hf_generation_config(
        vocab_size=config.vocab_size,
        vocabulary_rows=format.vocabulary_rows(config),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    write_json(folder / "generation_config.json", generation)


def adds_bos(checkpoint: Checkpoint, asked: bool | None) -> bool:
    """Whether the training's documents begin with BOS: what the checkpoint says; BadInput if `asked` contradicts it.

    A checkpoint of version 0.1.0 does not say. Then `asked` counts, or else, with a warning, the data set's manifest.
    """
    recorded: bool | None = checkpoint.facts.get("add_bos")
    if recorded is None and asked is None:
        return _data_has_bos(checkpoint)
    if recorded is not None and asked not in (None, recorded):
        raise BadInput(f"{checkpoint.path}: its run's documents {'begin' if recorded else 'do not begin'} with BOS")
    return bool(recorded if asked is None else asked)


def _data_has_bos(checkpoint: Checkpoint) -> bool:
    """What can be found where the run's data sets were, told in a warning."""
    facts = checkpoint.facts
    try:
        train = [TokenStore.open(path) for path in facts.get("train_data_dir", ())]
        if train and [store.dataset_id for store in train] == facts.get("dataset_id"):
            log.warning("%s does not say whether documents begin with BOS: asked its data set", checkpoint.path.name)
            return train[0].add_bos
    except BadInput:
        pass  # moved or removed: the warning below says so
    log.warning(
        "%s does not say whether documents begin with BOS, and its data set is not here: the exported tokenizer adds "
        "none. If they do, export again with --add_bos yes",
        checkpoint.path.name,
    )
    return False


def _sample(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Tensor:
    """(T,) token ids to compare logits on: the beginning of the run's validation set, or of our own text where that is
    not on this machine."""
    config, folder = checkpoint.config, checkpoint.facts.get("val_data_dir")
    tokens = min(SAMPLE_TOKENS, config.block_size)
    if folder and (Path(folder) / MANIFEST).is_file():
        store = TokenStore.open(folder)
        if store.tokenizer_fingerprint == tokenizer.fingerprint:
            log.info("comparing logits on the beginning of %s", folder)
            shard = store.shards[0]
            with ShardFile(store.path, shard, store) as file:
                ids = file.read(0, min(tokens, shard.tokens))
            return torch.from_numpy(ids.astype("int64"))
    log.info("comparing logits on a built-in German text: the run's validation set is not here")
    return torch.tensor(tokenizer.encode(GERMAN_TEXT)[:tokens])


def open_checkpoint(path: Path, model_name: str | None) -> Checkpoint:
    """The checkpoint at `path`, verified; BadInput if it is damaged or not of the registered model `model_name`."""
    if not path.is_dir():
        said = f"that is a file of a checkpoint; give its folder, {path.parent}" if path.is_file() else ""
        raise BadInput(f"--checkpoint {path}: {said or 'no such checkpoint folder'}")
    try:
        checkpoint = verified(path)
    except DamagedCheckpoint as error:
        raise BadInput(f"--checkpoint {path}: {error}") from None
    require_shape(checkpoint, model_name)
    return checkpoint


def require_shape(checkpoint: Checkpoint, model_name: str | None) -> None:
    """Raise BadInput unless the checkpoint has the shape of the registered model; None allows any."""
    if model_name is None:
        return
    entry, config = Config.from_name(model_name), checkpoint.config
    for field in SHAPE_FIELDS:
        if getattr(entry, field) != getattr(config, field):
            raise BadInput(
                f"{checkpoint.path} is a checkpoint of {config.name}, not of {model_name}: "
                f"its {field} is {getattr(config, field)}, not {getattr(entry, field)}"
            )


def open_tokenizer(checkpoint: Checkpoint, path: Path | None) -> Tokenizer:
    """The tokenizer in `path`, or the run's own; BadInput unless the run was trained with it."""
    path = path or checkpoint.facts.get("tokenizer_path")
    if path is None:
        raise BadInput("the checkpoint names no tokenizer folder: give it by --tokenizer_path")
    tokenizer = Tokenizer.from_folder(path)
    if tokenizer.vocab_size != checkpoint.config.vocab_size:
        raise BadInput(
            f"vocabulary mismatch: {path} has {tokenizer.vocab_size} ids, the checkpoint {checkpoint.config.vocab_size}"
        )
    if tokenizer.fingerprint != checkpoint.facts.get("tokenizer_fingerprint", tokenizer.fingerprint):
        raise BadInput(f"{path} is not the tokenizer of the run: its fingerprint differs from the checkpoint's")
    return tokenizer
