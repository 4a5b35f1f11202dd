"""Device memory of a training step, by part: a function of shape, settings and number of processes. No GPU needed.

The settings are resolved (resolve.py). Counted is what PyTorch has allocated at three moments of a step after the
first: at the end of the forward pass, when the backward pass enters the last block, and at the update. A block keeps
for its backward pass what torch.compile's partitioner saves (tests/train/test_memory_plan.py compares), numbers for
each token:

    inputs of the GEMMs and norms: residual, norm, attention's output, projection, norm: 5 C; MLP: I
    rotated queries and keys: C + G D;  output of the qkv GEMM, of which the values are a view: C + 2 G D
    gate and up: 2 I;  log-sum-exp of attention: H in fp32;  1 / RMS of both norms: 2 in fp32

and, on one device with fp32 weights, a bf16 copy of each matrix. Quack and float8 recompute SwiGLU's output: I less.
Rowwise float8 keeps no output of the norms; tensorwise float8 keeps these and attention's output in 8 bits. With
activation checkpointing (activation_checkpointing.py), `full` keeps C, and `selective` keeps the outputs of GEMMs and
attention; what a block recomputes counts once, in the backward pass. The loss (loss.py) holds the logits of
CHUNK_TOKENS tokens and their gradient, and until the backward pass the gradients of its input and weight.

With several processes (FSDP2), a rank holds its shard of weights, gradients and optimizer state. Unsharded are the
outer unit (embedding, head), the block in use, the block that is prefetched and its all-gather buffer; or all blocks,
if weights stay between forward and backward. Gradients that micro-batches accumulate are fp32: unsharded on every rank,
or with --gradient_sync micro_batch its shard, until the update; with one process too.

Not counted: CUDA's context and NCCL's buffers (1 to 2 GiB outside PyTorch), fragmentation (a few percent), and the
masks of attention backends that need one (fp32).
"""

from __future__ import annotations

from typing import NamedTuple

from lit_gpt.config import Config
from lit_gpt.model.loss import CHUNK_TOKENS
from lit_gpt.model.settings import ModelSettings
from lit_gpt.train.muon_plan import matrix_numbers, working_numbers
from lit_gpt.train.settings import OptimizerSettings, StepSettings

# Sizes: N tokens of a micro-batch, T tokens a row, C width, H query heads, G key-value heads, D head size, I MLP width,
# V padded vocabulary, L blocks.

USABLE_SHARE = 0.95
"""Share of a GPU's memory that a plan may fill; the rest is lost to fragmentation."""


class Memory(NamedTuple):
    """Bytes on one device at one moment of a step."""

    moment: str
    weights: int
    """This rank's shard, as the optimizer sees it."""
    gradients: int
    optimizer: int
    compute_weights: int
    """Weights beside the shard: copies in the compute dtype, all-gathered units with their buffers, and the matrices
    that Muon works on."""
    activations: int
    loss: int
    """Logits of one chunk and the gradients that the fused loss holds."""

    @property
    def total(self) -> int:
        return sum(self[1:])


class _Sizes(NamedTuple):
    """What all three moments depend on."""

    tokens: int
    """Of a micro-batch."""
    compute_bytes: int
    """Of a number in the compute dtype."""
    stored_bytes: int
    """Of a number in weights, the optimizer's moments and the gradients of one micro-batch."""
    shards: int
    single: bool
    """One process, which shards nothing."""
    state: int
    """Bytes of the optimizer's moments on this rank."""
    sums: int
    """Bytes of the gradients of earlier micro-batches, fp32."""
    sums_are_gradients: bool
    """The update gets the gradients as fp32 sums."""


def step_memory(config: Config, settings: StepSettings, world_size: int, shards: int) -> tuple[Memory, Memory, Memory]:
    """The three moments on one of world_size ranks; `shards` ranks share one copy of the weights."""
    micro_batches = settings.global_batch_size // (settings.micro_batch_size * world_size)
    per_micro_batch = settings.gradient_sync == "micro_batch" and world_size > 1
    sums = 4 * config.parameters // (shards if per_micro_batch else 1)
    sizes = _Sizes(
        tokens=settings.micro_batch_size * config.block_size,
        compute_bytes=_compute_bytes(settings),
        stored_bytes=stored_bytes(settings),
        state=stored_bytes(settings) * state_numbers(config, settings) // shards,
        shards=shards,
        single=world_size == 1,
        sums=sums if micro_batches > 1 else 0,
        # with a mesh of copies, FSDP2 keeps the sums apart until they are all-reduced
        sums_are_gradients=world_size == 1 or (per_micro_batch and not settings.has_copies),
    )
    return (
        _end_of_forward(config, settings, sizes),
        _last_block_backward(config, settings, sizes),
        _update(config, settings, sizes),
    )


def peak_bytes(config: Config, settings: StepSettings, world_size: int, shards: int) -> int:
    """Bytes at the fullest moment."""
    return max(memory.total for memory in step_memory(config, settings, world_size, shards))


def stored_bytes(settings: ModelSettings) -> int:
    """Bytes of a number in weights and optimizer state."""
    return 2 if settings.precision == "bf16-true" else 4


def state_numbers(config: Config, settings: OptimizerSettings) -> int:
    """Numbers of the optimizer's state, over all ranks that share it: AdamW's two moments, or Muon's momentum."""
    return 2 * config.parameters - (matrix_numbers(config) if settings.optimizer == "muon" else 0)


def checkpoint_bytes(config: Config, settings: StepSettings) -> int:
    """Size of a checkpoint: weights and the optimizer's state."""
    return stored_bytes(settings) * (config.parameters + state_numbers(config, settings))


def largest_gathered_unit(config: Config, settings: ModelSettings) -> int:
    """Bytes of the largest FSDP unit in the compute dtype: a block, or the outer unit."""
    outer = config.parameters - config.n_layer * config.block_parameters
    return max(outer, config.block_parameters) * _compute_bytes(settings)


def kept_bytes_per_token(config: Config, settings: ModelSettings) -> int:
    """Bytes of activations that one block keeps of each token for its backward pass."""
    if settings.activation_checkpointing == "full":
        return config.n_embd * _compute_bytes(settings)
    width, keys, hidden = config.n_embd, config.n_query_groups * config.head_size, config.intermediate_size
    if settings.activation_checkpointing == "selective":
        return (4 * width + 2 * keys + 2 * hidden) * _compute_bytes(settings) + config.n_head * 4
    return _all_bytes_per_token(config, settings)


def _all_bytes_per_token(config: Config, settings: ModelSettings) -> int:
    """Bytes of activations that a block's backward pass needs of each token."""
    width, keys, hidden = config.n_embd, config.n_query_groups * config.head_size, config.intermediate_size
    numbers = 7 * width + 3 * keys + 3 * hidden
    if _recomputes_swiglu(settings):
        numbers -= hidden
    if settings.float8 == "rowwise":
        numbers -= 2 * width
    if settings.float8 == "tensorwise":
        return (numbers - 2 * width) * _compute_bytes(settings) + 3 * width + (config.n_head + 2) * 4
    return numbers * _compute_bytes(settings) + (config.n_head + 2) * 4


def _recomputes_swiglu(settings: ModelSettings) -> bool:
    """Whether the backward pass recomputes SwiGLU's output."""
    return settings.float8 != "none" or settings.mlp == "quack"


def _compute_bytes(settings: ModelSettings) -> int:
    """Bytes of a number in the compute dtype."""
    return 4 if settings.precision == "32-true" else 2


def _end_of_forward(config: Config, settings: StepSettings, sizes: _Sizes) -> Memory:
    compute_bytes, vocabulary = sizes.compute_bytes, config.padded_vocab_size
    head = vocabulary * config.n_embd
    chunk = min(sizes.tokens, CHUNK_TOKENS) * vocabulary
    # logits, their gradient, and from the second chunk on the gradient of the one before; uncompiled: fp32 temporaries
    before, temporary = (compute_bytes if sizes.tokens > CHUNK_TOKENS else 0), (0 if settings.compile else 17)
    logits = chunk * (compute_bytes + before + (temporary or compute_bytes))
    head_copy = compute_bytes * head if sizes.single and sizes.stored_bytes != compute_bytes else 0
    residual = compute_bytes * sizes.tokens * config.n_embd
    return _memory(
        "forward",
        config,
        sizes,
        gradients=sizes.sums,
        compute_weights=_weights_in_use(config, settings, sizes, in_backward=False) + head_copy,
        activations=_kept(config, settings, sizes) + residual,  # output of the last norm
        loss=logits + residual + 4 * head,  # gradients of input and weight
    )


def _last_block_backward(config: Config, settings: StepSettings, sizes: _Sizes) -> Memory:
    """The loss's gradients are gone; the block holds its MLP's: of the residual, SwiGLU's output, gate and up."""
    compute_bytes = sizes.compute_bytes
    working = (2 * config.n_embd + 3 * config.intermediate_size) * compute_bytes * sizes.tokens
    recomputed = (_all_bytes_per_token(config, settings) - kept_bytes_per_token(config, settings)) * sizes.tokens
    head_gradient = config.padded_vocab_size * config.n_embd * (sizes.stored_bytes if sizes.single else compute_bytes)
    # their fp32 sum over ranks comes when the block's activations are gone
    block_gradients = config.block_parameters * (sizes.stored_bytes if sizes.single else compute_bytes)
    return _memory(
        "backward",
        config,
        sizes,
        gradients=sizes.sums + head_gradient + block_gradients,
        compute_weights=_weights_in_use(config, settings, sizes, in_backward=True),
        activations=_kept(config, settings, sizes) + recomputed + working,
        loss=0,
    )


def _update(config: Config, settings: StepSettings, sizes: _Sizes) -> Memory:
    """All gradients are there; with several processes the outer unit's reduce-scatter is still running."""
    outer = config.parameters - config.n_layer * config.block_parameters
    share = sizes.stored_bytes * config.parameters // sizes.shards
    reduction = 0 if sizes.single else outer * (2 * sizes.compute_bytes + 4)  # weights, gradients, and these in fp32
    matrices = working_numbers(config, sizes.shards) if settings.optimizer == "muon" else 0
    return _memory(
        "update",
        config,
        sizes,
        gradients=sizes.sums if sizes.sums and sizes.sums_are_gradients else share,
        compute_weights=reduction + matrices * sizes.compute_bytes,
        activations=0,
        loss=0,
    )


def _memory(
    moment: str, config: Config, sizes: _Sizes, *, gradients: int, compute_weights: int, activations: int, loss: int
) -> Memory:
    share = sizes.stored_bytes * config.parameters // sizes.shards
    return Memory(moment, share, gradients, sizes.state, compute_weights, activations, loss)


def _weights_in_use(config: Config, settings: StepSettings, sizes: _Sizes, *, in_backward: bool) -> int:
    block, blocks = config.block_parameters * sizes.compute_bytes, config.n_layer
    if sizes.single:
        if sizes.stored_bytes == sizes.compute_bytes or settings.float8 != "none":  # 8-bit casts are not kept
            return 0
        if settings.activation_checkpointing != "none":  # the casts are recomputed
            return block if in_backward else 0
        return blocks * block
    outer = (config.parameters - blocks * config.block_parameters) * sizes.compute_bytes
    whole_blocks = min(2, blocks) if settings.reshards_after_forward else blocks
    return outer + (whole_blocks + 1) * block  # + 1: the all-gather buffer


def _kept(config: Config, settings: ModelSettings, sizes: _Sizes) -> int:
    """Activations that all blocks keep, the input of the last norm, and RoPE's cos and sin."""
    outside = sizes.compute_bytes * config.n_embd + 4 * config.head_size
    return (config.n_layer * kept_bytes_per_token(config, settings) + outside) * sizes.tokens
