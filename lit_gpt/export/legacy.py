"""Import an `iter-*.pth` of TinyLlama or LLäMmlein, the published programs that this project follows.

Such a file is one pickled dictionary: `model` (weights under lit-gpt's names), `optimizer`, `hparams`, `iter_num`,
`step_count`. `attn.attn` holds, for each query group, its query heads, then its key, then its value; the MLP is
`swiglu.w1` to `w3` (gate, up, down) or, without xformers, `fc_1`, `fc_2` and `proj`.

The weights are read through torch's weights_only loader, which runs no code. Before the checkpoint is published, our
model's logits are compared with `published_logits`: the published forward pass on the file's own layout, its weights
read by another reader. RoPE is in fp32 there, as in the published Hugging Face models; the training rounded it to bf16.
Cost: the file is mapped, so memory is needed for the largest weights only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lit_gpt.checkpoint import full_state
from lit_gpt.checkpoint.torch_file import MalformedState, require_dense
from lit_gpt.cli import BadInput
from lit_gpt.config import REGISTRY, Config
from lit_gpt.export.hf_folder import damaged, load_plain
from lit_gpt.export.hf_weights import to_lit
from lit_gpt.export.parity import Fetch, fetch_from

_WRAPPERS = re.compile(r"(_forward_module|module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What wrappers put into names."""
_WHOLE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_OF_BLOCK = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "mlp.swiglu.w1": "mlp.gate_proj",
    "mlp.swiglu.w2": "mlp.up_proj",
    "mlp.swiglu.w3": "mlp.down_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_PARTS = ("q_proj", "k_proj", "v_proj")


class LegacyState:
    """An `iter-*.pth`, mapped; its weights under Hugging Face's names. Raises BadInput if it is no such file."""

    def __init__(self, path: Path) -> None:
        found = load_plain(path)
        model = found.get("model") if isinstance(found, dict) else None
        if not isinstance(model, dict) or not all(isinstance(weight, Tensor) for weight in model.values()):
            raise BadInput(f"{path} holds no weights under 'model': not an iter-*.pth of TinyLlama or LLäMmlein")
        try:
            for name, weight in model.items():
                require_dense(weight, str(name), path.stat().st_size)
        except MalformedState as error:
            raise damaged(path, error) from None
        self.others = [str(name)[:40] for name in found if name != "model"]
        hparams = found.get("hparams")
        name = hparams.get("model_name") if isinstance(hparams, dict) else None
        self.model_name = name if isinstance(name, str) else None
        self._path = path
        self._weights = {_WRAPPERS.sub("", str(name)): weight for name, weight in model.items()}
        for name, weight in self._weights.items():
            if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise BadInput(f"{path}: weight {name!r} is stored as {weight.dtype}; fp32, fp16 and bf16 are read")

    def config(self, model_name: str | None, vocab_size: int | None) -> Config:
        """The shape: the registered model of that name, which must fit, or (None) the one that the file names."""
        name = model_name or self.model_name
        if name is None or (name not in REGISTRY and model_name is None):
            raise BadInput(f"{self._path} does not say its shape: give --model_name. Valid: {', '.join(REGISTRY)}")
        entry, table = Config.from_name(name), self._weights.get("transformer.wte.weight")
        rows = table.shape[0] if table is not None and table.dim() == 2 else 0
        config = replace(
            entry, vocab_size=vocab_size or (rows if rows != entry.padded_vocab_size else entry.vocab_size)
        )
        if rows not in (config.vocab_size, config.padded_vocab_size):
            raise BadInput(f"vocabulary mismatch: {self._path} has {rows} rows, the tokenizer {config.vocab_size} ids")
        return config

    @property
    def swiglu(self) -> bool:
        """Whether the MLP has the names of xformers."""
        return any(".mlp.swiglu." in name for name in self._weights)

    def tensors(self, config: Config) -> Iterator[tuple[str, Tensor]]:
        """Our (name, tensor) in fp32. BadInput if a weight is missing, unknown, of another shape or not finite."""
        names = {hf: legacy for legacy in self._weights for hf in _hf_names(legacy)}
        if sum(len(_hf_names(legacy)) for legacy in self._weights) != len(names):
            raise BadInput(f"{self._path} holds a weight twice, in both forms of the MLP")

        def read(name: str) -> Tensor:
            weight = self._weights[names[name]]
            if name.endswith(tuple(f"self_attn.{part}.weight" for part in _PARTS)):
                weight = _part_of_groups(weight, config, name, names[name])
            if not weight.isfinite().all():
                raise BadInput(f"weight {names[name]!r} holds NaN or infinity")
            return weight.float()

        yield from to_lit(config, names, read, self._weights["transformer.wte.weight"].shape[0])


def _hf_names(legacy: str) -> list[str]:
    """The Hugging Face weights that a published one holds; an unknown one stays as it is."""
    if legacy in _WHOLE:
        return [_WHOLE[legacy]]
    if (found := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", legacy)) is None:
        return [legacy]
    block, part = f"model.layers.{found[1]}", found[2]
    if part == "attn.attn":
        return [f"{block}.self_attn.{name}.weight" for name in _PARTS]
    return [f"{block}.{_OF_BLOCK[part]}.weight" if part in _OF_BLOCK else legacy]


def _part_of_groups(qkv: Tensor, config: Config, name: str, legacy: str) -> Tensor:
    """The rows of all queries, keys or values, from (group, queries | key | value)."""
    groups, per_group = config.n_query_groups, config.n_head // config.n_query_groups
    shape = (groups * (per_group + 2) * config.head_size, config.n_embd)
    if tuple(qkv.shape) != shape:
        raise BadInput(f"weight {legacy!r} has shape {tuple(qkv.shape)}, the model's shape needs {shape}")
    heads = qkv.view(groups, per_group + 2, config.head_size, config.n_embd)
    wanted = {"q": heads[:, :per_group], "k": heads[:, -2:-1], "v": heads[:, -1:]}[name.split(".")[-2][0]]
    return wanted.reshape(-1, config.n_embd)


def published_weights(path: Path) -> Fetch:
    """Gives weights of the file by their published names, read one by one from their offsets."""
    try:
        return fetch_from((_WRAPPERS.sub("", name), weight.float()) for name, weight in full_state.weights(path))
    except MalformedState as error:
        raise BadInput(str(error)) from None


def published_logits(config: Config, fetch: Fetch, tokens: Tensor, *, swiglu: bool) -> Tensor:
    """Logits (T, V) in fp32 of the published forward pass for tokens (T,)."""
    parts = ("swiglu.w1", "swiglu.w2", "swiglu.w3") if swiglu else ("fc_1", "fc_2", "proj")
    gate_up_down = tuple(f"mlp.{part}" for part in parts)
    x = fetch(["transformer.wte.weight"])["transformer.wte.weight"][tokens]  # (T, C)
    rotations = _rotations(config, len(tokens))
    for i in range(config.n_layer):
        names = ("norm_1", "attn.attn", "attn.proj", "norm_2", *gate_up_down)
        found = fetch([f"transformer.h.{i}.{name}.weight" for name in names])
        w: Mapping[str, Tensor] = {name: found[f"transformer.h.{i}.{name}.weight"] for name in names}
        x = x + _attention(config, _norm(config, x, w["norm_1"]) @ w["attn.attn"].T, rotations) @ w["attn.proj"].T
        n = _norm(config, x, w["norm_2"])
        gate, up, down = (w[name] for name in gate_up_down)
        x = x + (functional.silu(n @ gate.T) * (n @ up.T)) @ down.T
    last = fetch(["transformer.ln_f.weight", "lm_head.weight"])
    return _norm(config, x, last["transformer.ln_f.weight"]) @ last["lm_head.weight"].T


def _norm(config: Config, x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps)


def _rotations(config: Config, tokens: int) -> Tensor:
    """(T, D / 2) complex: by how much each pair (i, i + D / 2) of a head is turned."""
    half = config.head_size // 2
    frequencies = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _attention(config: Config, qkv: Tensor, rotations: Tensor) -> Tensor:
    """(T, C) from (T, groups x (queries | key | value)); causal."""
    tokens, per_group, half = len(qkv), config.n_head // config.n_query_groups, config.head_size // 2
    heads = qkv.view(tokens, config.n_query_groups, per_group + 2, config.head_size)
    pairs = torch.complex(heads[..., :half], heads[..., half:]) * rotations[:, None, None]
    turned = torch.cat([pairs.real, pairs.imag], -1)
    scores = torch.einsum("tgqd,sgd->gqts", turned[:, :, :-2], turned[:, :, -2]) / config.head_size**0.5
    scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("gqts,sgd->tgqd", scores.softmax(-1), heads[:, :, -1]).reshape(tokens, -1)
