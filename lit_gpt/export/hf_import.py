"""Import a Hugging Face LLaMA as a step-0 checkpoint to continue training from, checked before it is published.

The weights are kept in fp32, which represents bf16 and fp16 exactly, so exporting the checkpoint gives the same bits
again. The check compares the logits of transformers' model and ours, in fp32, on text in the folder's tokenizer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoint.checkpoint import write_initial
from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.data.tokenizer_folder import FILES
from lit_gpt.export.hf_folder import HFWeights
from lit_gpt.export.hf_tokenizer import TRICKY_TEXTS, require_same_ids
from lit_gpt.export.hf_weights import config_from_hf, to_lit, unread_keys
from lit_gpt.export.legacy import LegacyState, published_logits, published_weights
from lit_gpt.export.parity import GERMAN_TEXT, SAMPLE_TOKENS, Parity, Reference, compare, our_logits
from lit_gpt.files import read_json

log = logging.getLogger(__name__)


def import_folder(
    folder: Path, destination: Path, reference: Reference, *, model_name: str | None, tokenizer_path: Path | None
) -> Parity:
    """Publish the checkpoint `destination`; raises BadInput, and publishes nothing, if we cannot train this model."""
    if destination.exists():
        raise BadInput(f"{destination} exists already: name another destination, or remove it first")
    fields = read_json(folder / "config.json")
    if fields.get("transformers_weights") or (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder} holds an adapter, or names its own weights file: merge it into plain weights first")
    tokenizer, tokenizer_path = _tokenizer(folder, tokenizer_path)
    config = config_from_hf(fields, model_name=model_name, vocab_size=tokenizer.vocab_size if tokenizer else None)
    weights = HFWeights(folder)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        converted = to_lit(config, weights.names, weights.read, fields["vocab_size"])
        return ((name, tensor.float()) for name, tensor in converted)

    sample = _sample(tokenizer, config.vocab_size)[: config.block_size]
    ours = our_logits(config, tensors(), sample)
    theirs = reference.logits(folder, weights.dtype, sample)
    try:
        parity = compare(ours, theirs)
    except BadInput as error:
        unread = unread_keys(fields)
        hint = f"; keys of config.json that are not read here: {', '.join(unread)}" if unread else ""
        raise BadInput(f"{error}{hint}") from None
    run: dict[str, Any] = {"step": 0, "slot": 0, "tokens": 0, "settings": {}, "imported_from": str(folder)}
    if tokenizer:
        run |= {"tokenizer_path": str(tokenizer_path), "tokenizer_fingerprint": tokenizer.fingerprint}
        run |= _adds_bos(folder, tokenizer, reference)
    try:
        write_initial(destination, config, tensors(), run)
    except OSError as error:
        raise BadInput(f"cannot write {destination}: {error.strerror}") from None
    return parity


def import_legacy(path: Path, destination: Path, *, model_name: str | None, tokenizer_path: Path | None) -> Parity:
    """`import_folder` for an iter-*.pth of the published programs; see legacy.py."""
    if os.path.lexists(destination):
        raise BadInput(f"{destination} exists already: name another destination, or remove it first")
    tokenizer = Tokenizer.from_folder(tokenizer_path) if tokenizer_path else None
    state = LegacyState(path)
    config = state.config(model_name, tokenizer.vocab_size if tokenizer else None)
    sample = _sample(tokenizer, config.vocab_size)[: config.block_size]
    ours = our_logits(config, state.tensors(config), sample)
    theirs = published_logits(config, published_weights(path), sample, swiglu=state.swiglu)
    parity = compare(ours, theirs)
    run: dict[str, Any] = {"step": 0, "slot": 0, "tokens": 0, "settings": {}, "imported_from": str(path)}
    if tokenizer:
        run |= {"tokenizer_path": str(tokenizer_path), "tokenizer_fingerprint": tokenizer.fingerprint}
    try:
        write_initial(destination, config, state.tensors(config), run)
    except OSError as error:
        raise BadInput(f"cannot write {destination}: {error.strerror}") from None
    log.info("left behind in %s: %s", path, ", ".join(state.others) or "nothing")
    return parity


def _tokenizer(folder: Path, path: Path | None) -> tuple[Tokenizer | None, Path | None]:
    """The tokenizer for the training, and its folder: `path`, which must give the same ids, or the folder's own."""
    there = [folder / name for name in FILES[:2] if os.path.lexists(folder / name)]
    for file in there:
        if not file.is_file():
            raise BadInput(f"{file} is no file, or a link that leads to none: fetch the model's files again")
    own = Tokenizer.from_folder(folder) if there else None
    if path is None:
        return own, folder if own else None
    named = Tokenizer.from_folder(path)
    if own:
        require_same_ids(named, own.encode, (GERMAN_TEXT, *TRICKY_TEXTS), add_bos=False)
    return named, path.absolute()


def _adds_bos(folder: Path, tokenizer: Tokenizer, reference: Reference) -> dict[str, bool]:
    """The fact whether texts begin with BOS for this model, if transformers can say: its rules are not in the files."""
    if not any((folder / name).is_file() for name in FILES[:2]):
        return {}
    try:
        return {"add_bos": list(reference.encoder(folder)("a"))[:1] == [tokenizer.bos_id]}
    except BadInput as error:
        log.warning("%s: whether texts begin with BOS is not recorded", error)
        return {}


def _sample(tokenizer: Tokenizer | None, vocab_size: int) -> Tensor:
    if tokenizer:
        return torch.tensor(tokenizer.encode(GERMAN_TEXT)[:SAMPLE_TOKENS])
    log.warning("the folder has no tokenizer: comparing logits on random ids")
    return torch.randint(vocab_size, (SAMPLE_TOKENS,), generator=torch.Generator().manual_seed(0))
