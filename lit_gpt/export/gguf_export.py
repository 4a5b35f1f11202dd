"""Convert an exported Hugging Face folder to one GGUF file for llama.cpp, with the tokenizer inside.

Matrices are stored as f16, bf16 or q8_0 (blocks of 32 weights with one scale), vectors as f32. llama.cpp's rotary
embedding rotates neighbouring dimensions of a head, transformers' rotates i and i + D / 2, so the rows of q and k are
re-ordered. Cost: memory for one weight in fp32. Needs the package `gguf`.

llama.cpp has two kinds of BPE. For BPE over characters ("llama"), the merge order becomes scores; llama.cpp stops at a
character that the vocabulary lacks, where training saw <unk>. For BPE over bytes ("gpt2"), the first split must be one
that llama.cpp has a name for: the first that gives our ids on probe texts.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export.hf_folder import HFWeights
from lit_gpt.export.hf_tokenizer import TRICKY_TEXTS
from lit_gpt.export.hf_weights import llama_fields, rope_base
from lit_gpt.export.parity import GERMAN_TEXT
from lit_gpt.files import publishing_new, read_json

log = logging.getLogger(__name__)

SPLITS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
"""First splits that llama.cpp has known by name since 2024 (src/llama-vocab.cpp); the most similar to ours is first.

Ours differs from qwen2's in two rare cases, which the probes leave out: a word after an apostrophe that begins like an
English contraction ('Test), and combining marks, if the vocabulary has a token that joins one with its letter.
"""


def write_gguf(folder: Path, destination: Path, kind: str) -> None:
    """Write `destination` from a folder that create.sh wrote; kind: f16, bf16 or q8_0. If it cannot, BadInput and no
    file."""
    gguf = _package()
    fields = llama_fields(read_json(folder / "config.json"))
    tokenizer, weights = Tokenizer.from_folder(folder), HFWeights(folder)
    try:
        with publishing_new(destination, folder=False) as partial:
            writer = gguf.GGUFWriter(partial, "llama")
            try:
                _add_fields(writer, fields, destination.stem, gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
                _add_vocabulary(writer, gguf, folder, tokenizer, fields["vocab_size"])
                _write_weights(writer, gguf, fields, weights, gguf.GGMLQuantizationType[kind.upper()])
            finally:
                writer.close()
    except OSError as error:
        raise BadInput(f"cannot write {destination}: {error.strerror}") from None


def _package() -> ModuleType:
    if importlib.util.find_spec("gguf") is None:
        raise BadInput("the package gguf is not installed: pip install 'lit_gpt[gguf]'")
    import gguf

    return gguf


def _add_fields(writer: Any, fields: dict[str, Any], name: str, file_type: int) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_rope_dimension_count(fields["hidden_size"] // fields["num_attention_heads"])
    writer.add_rope_freq_base(rope_base(fields))
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_vocab_size(fields["vocab_size"])


# Weights


def _write_weights(writer: Any, gguf: ModuleType, fields: dict[str, Any], weights: HFWeights, kind: int) -> None:
    """Two passes: the header needs every tensor's size before the first tensor is written."""
    names = sorted(weights.names)
    to_gguf = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, fields["num_hidden_layers"])
    for name in names:
        gguf_name = to_gguf.get_name(name, try_suffixes=(".weight",))
        if gguf_name is None:
            raise BadInput(f"weight {name!r} has no place in a GGUF file of a LLaMA")
        shape, stored = weights.shape(name), _stored(gguf, weights.shape(name), kind)
        block_weights, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        if shape[-1] % block_weights:
            raise BadInput(
                f"weight {name!r} has rows of {shape[-1]}: {stored.name} needs a multiple of {block_weights}"
            )
        writer.add_tensor_info(
            gguf_name, shape, np.dtype(np.float32), int(np.prod(shape)) // block_weights * block_bytes, stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:
        values = _reordered(name, weights.read(name).float().numpy(), fields)
        writer.write_tensor_data(gguf.quants.quantize(values, _stored(gguf, values.shape, kind)))


def _stored(gguf: ModuleType, shape: tuple[int, ...], kind: int) -> Any:
    return gguf.GGMLQuantizationType.F32 if len(shape) == 1 else kind


def _reordered(name: str, values: npt.NDArray[np.float32], fields: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Rows i and i + D / 2 of each query and key head side by side; other weights unchanged."""
    heads = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}
    for part, count in heads.items():
        if f".{part}." in name:
            halves = values.reshape(count, 2, -1, values.shape[1])  # (H, 2, D / 2, C)
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    return values


# Vocabulary


def _add_vocabulary(writer: Any, gguf: ModuleType, folder: Path, tokenizer: Tokenizer, rows: int) -> None:
    rules = read_json(folder / "tokenizer.json")
    ids = rules["model"]["vocab"] | {token["content"]: token["id"] for token in rules["added_tokens"]}
    types = dict.fromkeys(range(rows), gguf.TokenType.UNUSED) | dict.fromkeys(ids.values(), gguf.TokenType.NORMAL)
    for token in rules["added_tokens"]:
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    texts = {id: text for text, id in ids.items()}
    writer.add_token_list([texts.get(id, f"[unused {id}]") for id in range(rows)])
    if rules["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        for id, text in texts.items():
            if text.startswith("<0x") and len(text) == len("<0x00>"):
                types[id] = gguf.TokenType.BYTE
        if gguf.TokenType.BYTE not in types.values():
            log.warning("the tokenizer has no byte tokens: llama.cpp stops at a character that the vocabulary lacks")
        writer.add_token_scores(list(_scores(rules, rows)))
        writer.add_add_space_prefix(rules["pre_tokenizer"].get("prepend_scheme") != "never")
        unknown = rules["model"]["unk_token"]
        types[ids[unknown]] = gguf.TokenType.UNKNOWN
        writer.add_unk_token_id(ids[unknown])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(rules))
        writer.add_token_merges([" ".join(_pair(merge)) for merge in rules["model"]["merges"]])
    writer.add_token_types([types[id] for id in range(rows)])
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(bool(read_json(folder / "tokenizer_config.json").get("add_bos_token", False)))


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge in tokenizer.json's older weight_format, "a b", or newer weight_format, ["a", "b"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _scores(rules: dict[str, Any], rows: int) -> Iterator[float]:
    """Each id's score. llama.cpp merges the highest first, so it is minus the rank of the token's first merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(rules["model"]["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    by_id = {id: -float(ranks.get(text, len(ranks))) for text, id in rules["model"]["vocab"].items()}
    return (by_id.get(id, 0.0) for id in range(rows))


def split_name(rules: dict[str, Any]) -> str:
    """llama.cpp's name for a first split that gives the ids of `rules` (a byte-level tokenizer.json) on probe texts.

    Raises BadInput if there is none.
    """
    probes = [GERMAN_TEXT, *TRICKY_TEXTS]

    def ids(pre_tokenizer: dict[str, Any]) -> list[list[int]]:
        backend = tokenizers.Tokenizer.from_str(json.dumps(rules | {"pre_tokenizer": pre_tokenizer}))
        return [encoding.ids for encoding in backend.encode_batch(probes, add_special_tokens=False)]

    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    expected = ids(rules["pre_tokenizer"])
    for name, regex in SPLITS.items():
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        if ids({"type": "Sequence", "pretokenizers": [split, to_bytes]}) == expected:
            return name
    raise BadInput(f"llama.cpp has no first split that gives this tokenizer's ids: tried {', '.join(SPLITS)}")
