"""Convert weights and config between our model and a Hugging Face LLaMA, in both directions by one table.

Our `attn.qkv` holds Hugging Face's q, k and v as blocks of rows, one after another; `mlp.gate_up` holds gate and up.
Both sides use the half-split form of the rotary embedding, so no row is permuted. Our vocabulary matrices have
`padded_vocab_size` rows; a folder's may be cut to fewer.

Invariants: every name of either side is in the table exactly once; an unknown name, a missing name or another shape is
an error that names it. Conversion keeps every bit. Cost: memory for one weight at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.config import REGISTRY, Config

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types of a folder's weights, by their names on the command line."""

SHAPE_FIELDS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_query_groups": "num_key_value_heads",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
}
"""The fields of Config that determine all shapes but the vocabulary's -> their names in config.json."""

_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_KEYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_CHECKED = (
    "model_type", "vocab_size", "max_position_embeddings", "rms_norm_eps", *SHAPE_FIELDS.values(), *_ROPE, "rope_theta",
    "partial_rotary_factor", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings", "head_dim",
)  # fmt: skip
_WITHOUT_EFFECT = (
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "dtype",
    "torch_dtype", "pretraining_tp", "transformers_version", "use_cache", "_name_or_path",
)  # fmt: skip
_KEYS = (*_CHECKED, *_WITHOUT_EFFECT)
"""Of config.json: those that a model here follows, and those that do not change its logits."""
_LARGEST_SIZE = 1 << 24
"""Of a width, a vocabulary, a context or a number of layers."""
_RECOMPUTED = ".rotary_emb.inv_freq"
"""Old versions of transformers stored the rotary frequencies; they follow from rope_theta, so they are skipped."""


class Weight(NamedTuple):
    """One of our weights, and the Hugging Face weights that are its blocks of rows, in order."""

    name: str
    parts: dict[str, int]
    """Hugging Face name -> rows."""
    columns: int | None
    """None: a vector."""
    of_vocabulary: bool = False
    """Whether it has one row per id, so that a folder may leave out the padding."""

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(self.parts.values())
        return (rows,) if self.columns is None else (rows, self.columns)


def weights(config: Config) -> Iterator[Weight]:
    """The table, in the order of a forward pass."""
    width, hidden, vocabulary = config.n_embd, config.intermediate_size, config.padded_vocab_size
    queries, keys = config.n_head * config.head_size, config.n_query_groups * config.head_size
    yield Weight("transformer.wte.weight", {"model.embed_tokens.weight": vocabulary}, width, of_vocabulary=True)
    for i in range(config.n_layer):
        lit, hf = f"transformer.h.{i}", f"model.layers.{i}"
        qkv = {
            f"{hf}.self_attn.q_proj.weight": queries,
            f"{hf}.self_attn.k_proj.weight": keys,
            f"{hf}.self_attn.v_proj.weight": keys,
        }
        gate_up = {f"{hf}.mlp.gate_proj.weight": hidden, f"{hf}.mlp.up_proj.weight": hidden}
        yield Weight(f"{lit}.norm_1.weight", {f"{hf}.input_layernorm.weight": width}, None)
        yield Weight(f"{lit}.attn.qkv.weight", qkv, width)
        yield Weight(f"{lit}.attn.proj.weight", {f"{hf}.self_attn.o_proj.weight": width}, queries)
        yield Weight(f"{lit}.norm_2.weight", {f"{hf}.post_attention_layernorm.weight": width}, None)
        yield Weight(f"{lit}.mlp.gate_up.weight", gate_up, width)
        yield Weight(f"{lit}.mlp.down.weight", {f"{hf}.mlp.down_proj.weight": width}, hidden)
    yield Weight("transformer.ln_f.weight", {"model.norm.weight": width}, None)
    yield Weight("lm_head.weight", {"lm_head.weight": vocabulary}, width, of_vocabulary=True)


def hf_shapes(config: Config, vocabulary_rows: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a folder's weights, in the table's order; vocabulary matrices have `vocabulary_rows` rows."""
    return {
        name: ((vocabulary_rows if weight.of_vocabulary else rows), *weight.shape[1:])
        for weight in weights(config)
        for name, rows in weight.parts.items()
    }


def to_hf(config: Config, tensors: Iterable[tuple[str, Tensor]], vocabulary_rows: int) -> Iterator[tuple[str, Tensor]]:
    """Convert our (name, tensor) to Hugging Face's, in the order given; views, not copies.

    Raises BadInput if a weight is missing, unknown or of another shape.
    """
    awaited = {weight.name: weight for weight in weights(config)}
    for name, tensor in tensors:
        if name not in awaited:
            raise BadInput(f"weight {name!r} is unknown to, or twice in, a model of shape {config.name}")
        weight = awaited.pop(name)
        _require_shape(name, tensor, weight.shape)
        if weight.of_vocabulary:
            tensor = tensor[:vocabulary_rows]
            yield from zip(weight.parts, [tensor], strict=True)
        else:
            yield from zip(weight.parts, tensor.split(list(weight.parts.values())), strict=True)
    if awaited:
        raise BadInput(f"weight {next(iter(awaited))!r} is missing ({len(awaited)} missing in all)")


def to_lit(
    config: Config, names: Collection[str], read: Callable[[str], Tensor], vocabulary_rows: int
) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor), in the table's order, from a folder's weights: all its `names`, which `read` reads.

    Raises BadInput if a weight is missing, unknown or of another shape.
    """
    shapes = hf_shapes(config, vocabulary_rows)
    if missing := [name for name in shapes if name not in names]:
        raise BadInput(f"weight {missing[0]!r} is missing ({len(missing)} missing in all)")
    if unknown := sorted(name for name in names if name not in shapes and not name.endswith(_RECOMPUTED)):
        raise BadInput(f"weight {unknown[0]!r} is unknown to a LLaMA ({len(unknown)} unknown in all)")
    for weight in weights(config):
        parts = []
        for name in weight.parts:
            tensor = read(name)
            _require_shape(name, tensor, shapes[name])
            parts.append(tensor)
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        yield weight.name, _pad_vocabulary(tensor, config, weight) if weight.of_vocabulary else tensor


def _pad_vocabulary(tensor: Tensor, config: Config, weight: Weight) -> Tensor:
    """`tensor` with padding rows, for ids that no token has, up to padded_vocab_size rows.

    The output projection's are the mean of its rows, so their logit is the mean logit. Its exp is at most the mean exp
    of the V logits (Jensen), so k padding rows raise a loss by at most log(1 + k / V): 0.0017 for the published
    vocabulary. Zero rows have no such bound.
    """
    absent = config.padded_vocab_size - len(tensor)
    if not absent:
        return tensor
    row = tensor.float().mean(0, keepdim=True) if weight.name == "lm_head.weight" else torch.zeros(1, config.n_embd)
    return torch.cat([tensor, row.to(tensor.dtype).expand(absent, -1)])


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise BadInput(f"weight {name!r} has shape {tuple(tensor.shape)}, the model's shape needs {shape}")


def hf_config(
    config: Config, *, dtype: torch.dtype, vocabulary_rows: int, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The content of config.json. transformers 4 and 5 both read the names rope_theta and torch_dtype.

    Padding is EOS, which the attention mask hides: without a padding id, batches of a classification head are refused.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary_rows,
        **{hf: getattr(config, ours) for ours, hf in SHAPE_FIELDS.items()},
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": (2 / (5 * config.n_embd)) ** 0.5,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def hf_generation_config(
    *, vocab_size: int, vocabulary_rows: int, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The content of generation_config.json: greedy, ends at EOS, never generates a padding id."""
    padding = list(range(vocab_size, vocabulary_rows))
    return {
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        **({"suppress_tokens": padding} if padding else {}),
    }


def config_from_hf(fields: Mapping[str, Any], *, model_name: str | None, vocab_size: int | None) -> Config:
    """Our Config for a config.json; BadInput if this project does not train such a model.

    Its name is `model_name`, or the first registered model of that shape. `vocab_size` is the tokenizer's (None: there
    is no tokenizer): the vocabulary matrices must have that many rows, or as many as its padding gives.
    """
    stated = llama_fields(fields)
    shape = {ours: stated[hf] for ours, hf in SHAPE_FIELDS.items()}
    same = [name for name, entry in REGISTRY.items() if all(getattr(entry, key) == shape[key] for key in shape)]
    if model_name is None and not same:
        raise BadInput(f"no registered model has the folder's shape {shape}: add one to REGISTRY in lit_gpt/config.py")
    entry = Config.from_name(model_name or same[0])
    for key, value in shape.items():
        if getattr(entry, key) != value:
            right = ", ".join(same) or "none"
            raise BadInput(
                f"the folder is not a {entry.name}: its {key} is {value}, not {getattr(entry, key)}. "
                f"Registered with the folder's shape: {right}"
            )
    rows = stated["vocab_size"]
    config = replace(
        entry,
        block_size=stated["max_position_embeddings"],
        norm_eps=stated["rms_norm_eps"],
        rope_base=rope_base(stated),
        vocab_size=vocab_size or (entry.vocab_size if entry.padded_vocab_size == rows else rows),
    )
    if rows not in (config.vocab_size, config.padded_vocab_size):
        raise BadInput(
            f"vocabulary mismatch: the folder's matrices have {rows} rows, its tokenizer {config.vocab_size} ids "
            f"({config.padded_vocab_size} with padding)"
        )
    return config


def llama_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's fields, completed; BadInput names a field, and its value, that our model does not support."""
    stated: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    if "num_attention_heads" in stated:  # older files lack it: then there are as many key-value heads as query heads
        stated.setdefault("num_key_value_heads", stated["num_attention_heads"])
    for key in ("model_type", "vocab_size", "max_position_embeddings", "rms_norm_eps", *SHAPE_FIELDS.values()):
        if key not in stated:
            raise BadInput(f"config.json has no {key}: not the folder of a LLaMA")
    _require_numbers(stated)
    supported = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "head_dim": stated["hidden_size"] // stated["num_attention_heads"],
        "rope_type": "default",
        "partial_rotary_factor": 1.0,
    }
    rope = _rope(stated)
    found = {
        **stated,
        "rope_type": rope.get("rope_type") or rope.get("type") or "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }
    for key, right in supported.items():
        if (value := found.get(key, right)) != right:
            raise BadInput(f"config.json: {key} is {value!r}; this project trains LLaMAs with {key} {right!r} only")
    return stated


def _require_numbers(stated: Mapping[str, Any]) -> None:
    """BadInput unless sizes are whole numbers of a model's order, the others finite numbers, and RoPE's a mapping."""
    for key in ("vocab_size", "max_position_embeddings", *SHAPE_FIELDS.values()):
        if type(stated[key]) is not int or not 1 <= stated[key] <= _LARGEST_SIZE:
            found = str(stated[key])[:80]
            raise BadInput(f"config.json: {key} is {found}, not a whole number from 1 to {_LARGEST_SIZE}")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(stated.get(key, {}), dict):
            raise BadInput(f"config.json: {key} is {str(stated[key])[:80]}, not an object")
    theta = _rope(stated).get("rope_theta")
    for key, value in (("rms_norm_eps", stated["rms_norm_eps"]), ("rope_theta", 1 if theta is None else theta)):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise BadInput(f"config.json: {key} is {str(value)[:80]}, not a positive number")


def unread_keys(fields: Mapping[str, Any]) -> list[str]:
    """The keys of a config.json that mean nothing here: where logits differ, one of them is the likely reason."""
    rope = (f"{name}.{key}" for name in _ROPE for key in fields.get(name) or () if key not in _ROPE_KEYS)
    return sorted([*(key for key, value in fields.items() if key not in _KEYS and value is not None), *rope])


def rope_base(fields: Mapping[str, Any]) -> float:
    return float(_rope(fields).get("rope_theta") or 10_000.0)


def _rope(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes rope_parameters, transformers 4 wrote rope_theta and rope_scaling; files mix them.

    By the rule of transformers 5, rope_scaling counts before rope_parameters, and what they lack may stand beside them.
    """
    beside = {key: fields[key] for key in ("rope_theta", "partial_rotary_factor") if key in fields}
    return {**beside, **(fields.get("rope_scaling") or fields.get("rope_parameters") or {})}
