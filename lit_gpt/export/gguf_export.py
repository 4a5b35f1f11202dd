"""Convert an exported Hugging Face folder to one GGUF file for llama.cpp, with the tokenizer inside.

Matrices are stored as f16, bf16 or q8_0 (blocks of 32 weights with one scale), vectors as f32. llama.cpp's rotary
embedding rotates neighbouring dimensions of a head, transformers' rotates i and i + D / 2, so the rows of q and k are
re-ordered. The file is published only after a proof that it gives the folder's ids (gguf_proof.py).
Cost: memory for one weight in fp32. Needs the package `gguf`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export.gguf_proof import probes, require_our_ids
from lit_gpt.export.gguf_vocabulary import add_vocabulary, adds_bos
from lit_gpt.export.hf_folder import HFWeights
from lit_gpt.export.hf_weights import llama_fields, rope_base
from lit_gpt.files import publishing_new, read_json


def write_gguf(folder: Path, destination: Path, kind: str) -> None:
    """Write `destination` from a folder that create.sh wrote; kind: f16, bf16 or q8_0. If it cannot, BadInput and no
    file."""
    gguf = _package()
    fields = llama_fields(read_json(folder / "config.json"))
    tokenizer, weights = Tokenizer.from_folder(folder), HFWeights(folder)
    texts = probes(tokenizer)
    try:
        with publishing_new(destination, folder=False) as partial:
            writer = gguf.GGUFWriter(partial, "llama")
            try:
                _add_fields(writer, fields, destination.stem, gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
                add_vocabulary(writer, gguf, folder, tokenizer, fields["vocab_size"], texts)
                _write_weights(writer, gguf, fields, weights, gguf.GGMLQuantizationType[kind.upper()])
            finally:
                writer.close()
            require_our_ids(partial, gguf, tokenizer, texts, add_bos=adds_bos(folder))
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
