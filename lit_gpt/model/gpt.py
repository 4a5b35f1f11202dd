"""The LLaMA model: pre-norm blocks of grouped-query attention with rotary positions, and SwiGLU.

A row holds several documents: `cu_seqlens` says where each segment starts, and attention and positions restart there.
Weights may have another type than activations: each layer casts its weight to its input's type. So fp32 master weights
compute in bf16 on one device as FSDP's mixed precision does on many, and their gradients are fp32.

Initial weights are a pure function of (seed, weight name, shape, kind of device): the same for every number of
processes, and whether or not the model was built on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_gpt.config import Config
from lit_gpt.model.attention import Segments, attention, make_segments
from lit_gpt.model.fused_mlp import add_matmul, fused_mlp
from lit_gpt.model.loss import cross_entropy, linear_cross_entropy

# Shapes: B rows, T tokens a row, C width, H query heads, G key-value heads, D head size, I MLP width, V vocabulary.


class Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Left to `initialize`: drawing here would depend on the order in which layers are made."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Left to `initialize`."""


class Attention(nn.Module):
    def __init__(self, config: Config, fused: bool) -> None:
        super().__init__()
        self.heads = (config.n_head, config.n_query_groups, config.n_query_groups)  # of q, k, v
        self.head_size = config.head_size
        self.qkv = Linear(config.n_embd, sum(self.heads) * config.head_size)
        self.proj = Linear(config.n_embd, config.n_embd)
        self.fused = fused

    def forward(
        self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, segments: Segments, backend: str
    ) -> Tensor:
        """residual plus the attention of x, both (B, T, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_size)).split(self.heads, dim=2)  # (B, T, H | G | G, D)
        y = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, segments, backend).flatten(2)  # (B, T, C)
        if self.fused:
            return add_matmul(residual.flatten(0, 1), y.flatten(0, 1), self.proj.weight).view_as(residual)
        return residual + self.proj(y)


class SwiGLU(nn.Module):
    fused: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None
    """fused_mlp.fused_mlp or float8.float8_mlp; None: layer by layer."""

    def __init__(self, config: Config, fused: bool) -> None:
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.n_embd)
        self.fused = fused_mlp if fused else None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual plus the MLP of x, both (B, T, C)."""
        if self.fused is not None:
            flat = x.flatten(0, 1), residual.flatten(0, 1)
            return self.fused(*flat, self.gate_up.weight, self.down.weight).view_as(x)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return residual + self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, mlp_backend: str = "torch") -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, mlp_backend == "quack")
        self.norm_2 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = SwiGLU(config, mlp_backend == "quack")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments, backend: str) -> Tensor:
        x = self.attn(self.norm_1(x), x, cos, sin, segments, backend)
        return self.mlp(self.norm_2(x), x)


class Transformer(nn.Module):
    """Everything below the head. Its attributes' names give the weights the names that lit-gpt gave them."""

    def __init__(self, config: Config, mlp_backend: str) -> None:
        super().__init__()
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, mlp_backend) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, eps=config.norm_eps)


class GPT(nn.Module):
    """A decoder of `config`'s shape. The backends come from attention.choose_backend and fused_mlp.choose_mlp."""

    def __init__(
        self,
        config: Config,
        *,
        attention_backend: str = "torch",
        mlp_backend: str = "torch",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.mlp_backend = mlp_backend
        self.compute_dtype = compute_dtype
        self.transformer = Transformer(config, mlp_backend)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        self.cross_entropy = cross_entropy
        self.compiled = False

    def compile_parts(self) -> None:
        """torch.compile each block in place, and the loss of a chunk of tokens. Weights keep their names.

        All blocks share one compilation, so that a start takes seconds. There is one graph with gradients and one
        without: the number of segments, the only size that differs between batches, is a symbol in them.
        """
        self.compiled = True
        for block in self.transformer.h:
            block.compile()
        self.cross_entropy = torch.compile(cross_entropy)

    def hidden_matrices(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The matrices of the blocks: each weight, and the rows of the layers' matrices that are stacked in it."""
        for block in self.transformer.h:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            yield attn.qkv.weight, tuple(heads * attn.head_size for heads in attn.heads)
            yield attn.proj.weight, (self.config.n_embd,)
            yield mlp.gate_up.weight, (self.config.intermediate_size,) * 2
            yield mlp.down.weight, (self.config.n_embd,)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) int64. Given targets (B, T) int64: the sum of their losses in nats, fp32.
        Given `at` (B,) int64: the logits (B, V) of that position of each row, without the memory of the others.

        cu_seqlens (S + 1,) int32: where each segment starts in the B * T tokens, then B * T. None: one segment a row.
        """
        rows, length = tokens.shape
        if length > self.config.block_size:
            raise ValueError(f"a row of {length} tokens exceeds block_size {self.config.block_size}")
        x = self.transformer.wte(tokens).to(self.compute_dtype)  # (B, T, C)
        segments = make_segments(cu_seqlens, rows, length, tokens.device, x.dtype, self.attention_backend)
        if self.compiled:
            torch._dynamo.mark_dynamic(segments.cu_seqlens, 0)
        cos, sin = rotary_angles(segments.positions, self.config.head_size, self.config.rope_base)
        for block in self.transformer.h:
            x = block(x, cos, sin, segments, self.attention_backend)
        x = self.transformer.ln_f(x)
        if at is not None:
            x = x[torch.arange(rows, device=x.device), at]  # (B, C)
        if targets is None:
            return self.lm_head(x)
        return linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.cross_entropy)


def rotary_angles(positions: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of positions (B, T) times the D / 2 rotary frequencies (arXiv:2104.09864): (B, T, 1, D / 2) fp32."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device) / head_size
    angles = positions.float().unsqueeze(-1) / base**exponents
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D) with dimension i and i + D / 2 rotated together, in fp32: the half-split form of GPT-NeoX."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Fill every weight, or this rank's shard of it: norms with 1, matrices from a normal distribution.

    Standard deviations as in GPT-NeoX (arXiv:2204.06745, section 2.2) and TinyLlama: sqrt(2 / (5 C)), and for the two
    projections back into the residual stream 1 / (sqrt(C) n_layer). A rank draws one whole weight at a time and keeps
    its shard.
    """
    width, layers = model.config.n_embd, model.config.n_layer
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
            continue
        into_residual = name.endswith(("attn.proj.weight", "mlp.down.weight"))
        std = 1 / (math.sqrt(width) * layers) if into_residual else math.sqrt(2 / (5 * width))
        generator = torch.Generator(weight.device).manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) >> 1)
        whole = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).normal_(
            0, std, generator=generator
        )
        if isinstance(weight, DTensor):
            whole = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(whole)
