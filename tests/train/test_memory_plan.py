"""The plan of a run, compared with hand calculations, with what the compiler keeps, and with measurements."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.model import attention
from lit_gpt.model.activation_checkpointing import checkpoint_activations
from lit_gpt.model.float8 import use_float8
from lit_gpt.model.gpt import GPT, Block, rotary_angles
from lit_gpt.train.memory_plan import kept_bytes_per_token, peak_bytes, step_memory
from lit_gpt.train.muon_plan import matrix_numbers, matrix_shapes, muon_step
from lit_gpt.train.resolve import resolve_for_plan
from lit_gpt.train.run_plan import lines, plan
from lit_gpt.train.settings import Settings, StepSettings
from tests.support import quack_stand_in
from tests.support.programs import run_program
from tests.support.training import command

DEBUG = StepSettings(model_name="debug", micro_batch_size=8, global_batch_size=8, mlp="torch", compile=True)
FP32_SUMS_1B, FP32_SUMS_7B = 2.05, 12.55
"""GiB of 2 bytes a weight: three runs were measured when bf16-true still added up its micro-batches in bf16."""
MEASURED = [  # GiB on one H100, torch 2.11, fa4, compiled (docs/benchmarks.md)
    (58.8, dict(model_name="LLaMmlein_1B", micro_batch_size=16, mlp="torch")),
    (51.88, dict(model_name="LLaMmlein_1B", micro_batch_size=16)),
    (69.82, dict(model_name="LLaMmlein_1B", micro_batch_size=24)),
    (28.58, dict(model_name="LLaMmlein_1B", micro_batch_size=4, global_batch_size=16)),
    (50.8, dict(model_name="LLaMmlein_1B", micro_batch_size=16, precision="bf16-true", mlp="torch")),
    (43.81, dict(model_name="LLaMmlein_1B", micro_batch_size=16, precision="bf16-true")),
    (61.75, dict(model_name="LLaMmlein_1B", micro_batch_size=24, precision="bf16-true")),
    (70.72, dict(model_name="LLaMmlein_1B", micro_batch_size=28, precision="bf16-true")),
    (54.14, dict(model_name="LLaMmlein_1B", micro_batch_size=24, precision="bf16-true", float8="rowwise")),
    (42.43, dict(model_name="LLaMmlein_1B", micro_batch_size=16, precision="bf16-true", float8="tensorwise")),
    (59.69, dict(model_name="LLaMmlein_1B", micro_batch_size=24, precision="bf16-true", float8="tensorwise")),
    (61.74 + FP32_SUMS_1B, dict(
        model_name="LLaMmlein_1B", micro_batch_size=24, global_batch_size=96, precision="bf16-true", float8="tensorwise"
    )),
    (18.56, dict(model_name="LLaMmlein_120M", micro_batch_size=32)),
    (20.9, dict(model_name="LLaMmlein_120M", micro_batch_size=32, mlp="torch")),
    (17.67, dict(model_name="LLaMmlein_120M", micro_batch_size=32, precision="bf16-true")),
    (74.47 + FP32_SUMS_7B, dict(
        model_name="LLaMmlein_7B", micro_batch_size=4, global_batch_size=12, precision="bf16-true", mlp="torch",
        activation_checkpointing="selective",
    )),
    (74.72 + FP32_SUMS_7B, dict(
        model_name="LLaMmlein_7B", micro_batch_size=4, global_batch_size=12, precision="bf16-true",
        activation_checkpointing="selective",
    )),
    (68.73 + FP32_SUMS_7B, dict(
        model_name="LLaMmlein_7B", micro_batch_size=3, global_batch_size=12, precision="bf16-true",
        float8="tensorwise", activation_checkpointing="selective",
    )),
]  # fmt: skip


def test_one_gpu_by_hand() -> None:
    """debug: C 128, D 32, H 4, G 2, I 352, V 4096, 4 blocks; 8 rows of 256 tokens: N 2048.

    A block has 32,768 + 16,384 + 135,168 + 256 = 184,576 weights; all: 2 x 524,288 + 4 x 184,576 + 128 = 1,787,008.
    A token keeps 2 x (7 x 128 + 3 x 64 + 3 x 352) + 4 x (4 + 2) = 4,312 bytes a block.
    """
    forward, backward, update = step_memory(DEBUG.config, DEBUG, 1, 1)
    weights, moments = 4 * 1_787_008, 8 * 1_787_008
    copies = 2 * 4 * 184_576
    kept = (4 * 4312 + 2 * 128 + 4 * 32) * 2048  # and the last norm's input, cos and sin
    hidden = 2 * 2048 * 128
    assert forward[1:] == (
        weights, 0, moments,
        copies + 2 * 524_288,  # the head in bf16
        kept + hidden,
        2048 * 4096 * 4 + hidden + 4 * 524_288,  # logits and their gradient, dx in bf16, dw in fp32
    )  # fmt: skip
    gradients = 4 * (524_288 + 184_576)  # of the head and of this block
    working = 2 * (2 * 128 + 3 * 352) * 2048
    assert backward[1:] == (weights, gradients, moments, copies, kept + working, 0)
    assert update[1:] == (weights, weights, moments, 0, 0, 0)
    two_micro_batches = step_memory(DEBUG.config, replace(DEBUG, micro_batch_size=4), 1, 1)
    assert two_micro_batches[0].gradients == weights
    in_bf16 = step_memory(DEBUG.config, replace(DEBUG, micro_batch_size=4, precision="bf16-true"), 1, 1)
    assert [memory.gradients for memory in in_bf16] == [weights, weights + gradients // 2, weights]  # sums in fp32
    assert step_memory(DEBUG.config, replace(DEBUG, precision="bf16-true"), 1, 1)[2].gradients == weights // 2


def test_four_gpus_by_hand() -> None:
    """FULL_SHARD of 1,787,008 / 4 = 446,752 weights; outside the blocks are 1,048,704, each block has 184,576."""
    settings = replace(DEBUG, micro_batch_size=1)  # two micro-batches on each of four processes
    forward, backward, update = step_memory(settings.config, settings, 4, 4)
    assert forward[1:5] == (4 * 446_752, 4 * 1_787_008, 8 * 446_752, 2 * (1_048_704 + 3 * 184_576))
    assert backward.gradients == 4 * 1_787_008 + 2 * 524_288 + 2 * 184_576
    assert update[1:] == (4 * 446_752, 4 * 446_752, 8 * 446_752, 8 * 1_048_704, 0, 0)
    each = replace(settings, gradient_sync="micro_batch")
    in_bf16 = replace(each, precision="bf16-true")
    copies = replace(in_bf16, sharding_strategy="HYBRID_SHARD", shard_group_size=2)
    for changed, shards, sums, at_update in (
        (each, 4, 4 * 446_752, 4 * 446_752),
        (in_bf16, 4, 4 * 446_752, 4 * 446_752),
        (copies, 2, 4 * 893_504, 2 * 893_504),
        (replace(each, micro_batch_size=2), 4, 0, 4 * 446_752),  # one micro-batch
    ):
        forward, _, update = step_memory(settings.config, changed, 4, shards)
        assert (forward.gradients, update.gradients) == (sums, at_update)
    whole = replace(settings, sharding_strategy="SHARD_GRAD_OP")
    assert step_memory(settings.config, whole, 4, 4)[0].compute_weights == 2 * (1_048_704 + 5 * 184_576)


def test_muon_by_hand() -> None:
    """In a block of debug: q and proj 128 x 128, k and v 64 x 128, gate and up 352 x 128, down 128 x 352: 184,320."""
    config, settings = DEBUG.config, replace(DEBUG, optimizer="muon")
    numbers = 4 * 184_320
    assert matrix_numbers(config) == numbers
    model = GPT(config)
    stacked = [(weight, rows) for weight, parts in model.hidden_matrices() for rows in parts]
    found = Counter((rows, weight.shape[1]) for weight, rows in stacked)
    assert matrix_shapes(config) == found == {(128, 128): 8, (64, 128): 8, (352, 128): 8, (128, 352): 4}
    forward, _, update = step_memory(config, settings, 1, 1)
    assert forward.optimizer == update.optimizer == 4 * (2 * 1_787_008 - numbers)
    assert update.compute_weights == 2 * 8 * (2 * 352 * 128 + 128 * 128)  # all of a shape together, in bf16
    shared = step_memory(config, replace(settings, micro_batch_size=1), 4, 4)[2]
    assert shared.optimizer == 2 * 1_787_008 - numbers
    assert shared.compute_weights - 8 * 1_048_704 == 2 * 2 * 3 * 352 * 128  # two of eight on a rank
    one = 5 * (4 * 128**3 + 2 * 128**3), 5 * (4 * 64**2 * 128 + 2 * 64**3), 5 * (4 * 128**2 * 352 + 2 * 128**3)
    alone = muon_step(config, 1, number_bytes=2, bytes_per_s=300e9)
    assert (alone.matrices, alone.sent_bytes) == (28, 0)
    assert alone.flops == 8 * one[0] + 8 * one[1] + 12 * one[2]
    four = muon_step(config, 4, number_bytes=2, bytes_per_s=300e9)  # which own 2, 2, 2 and 1 of the shapes
    assert (four.matrices, four.flops * 4) == (7, alone.flops)
    assert four.sent_bytes == 2 * (2 * numbers // 4 * 3 // 4)  # rows to three others, and as many back
    far = [muon_step(config, ranks, number_bytes=2, bytes_per_s=50e9) for ranks in (8, 64, 512)]
    assert [step.matrices for step in far] == [4, 4, 4]
    assert far[0].seconds < far[1].seconds < far[2].seconds < 10e-3
    planned = "\n".join(lines(plan(Settings(model_name="LLaMmlein_1B", optimizer="muon", devices=4, plan=True))))
    assert (
        "Muon: a GPU orthogonalizes at most 39 matrices in a step, 12.4 TFLOP, and sends at most 0.685 GiB" in planned
    )
    both = [plan(Settings(model_name="debug", optimizer=name, plan=True)) for name in ("adamw", "muon")]
    assert both[0].checkpoint_bytes - both[1].checkpoint_bytes == 4 * numbers


@pytest.mark.parametrize(("gib", "run"), MEASURED, ids=[f"{gib}" for gib, _ in MEASURED])
def test_measured_on_an_h100(gib: float, run: dict[str, Any]) -> None:
    settings = resolve_for_plan(StepSettings(**{"global_batch_size": run["micro_batch_size"]} | run))
    assert peak_bytes(settings.config, settings, 1, 1) / 2**30 == pytest.approx(gib, rel=0.05)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Quack's interface, and FlashAttention 4's, giving zeros: what is kept does not depend on the numbers."""

    def forward(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])

    def backward(*_: Any, dq: Tensor, dk: Tensor, dv: Tensor, **__: Any) -> None:
        for gradient in (dq, dk, dv):
            gradient.zero_()

    package = SimpleNamespace(interface=SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward))
    monkeypatch.setattr(attention, "_package", lambda backend: package)
    quack_stand_in.install(monkeypatch)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kept_by_the_compiler(config: Config, rows: int, *, checkpointing: str, mlp: str) -> int:
    """Bytes in distinct storages that a compiled block hands from its forward to its backward pass, without weights."""
    kept: list[Tensor] = []

    def partition(joint: Any, inputs: Any, **kwargs: Any) -> Any:
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def backward_compiler(module: Any, inputs: list[Any]) -> Any:
        kept.extend(x for x in inputs if isinstance(x, Tensor))
        return make_boxed_func(module)

    block = Block(config, "quack" if mlp == "quack" else "torch")
    if mlp == "float8":
        use_float8(nn.ModuleList([block]), "tensorwise", torch.device("cpu"))
    checkpoint_activations(block, checkpointing)
    block.compile(
        fullgraph=True,
        backend=aot_autograd(
            fw_compiler=lambda module, _: make_boxed_func(module),
            bw_compiler=backward_compiler,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        ),
    )
    shape = (rows, config.block_size)
    positions = torch.arange(config.block_size, dtype=torch.int32).expand(shape)
    cos, sin = rotary_angles(positions, config.head_size, config.rope_base)
    edges = torch.arange(0, rows + 1, dtype=torch.int32) * config.block_size
    segments = attention.Segments(edges, positions, config.block_size, None)
    x = torch.randn(*shape, config.n_embd, dtype=torch.bfloat16, requires_grad=True)
    block(x, cos, sin, segments, "fa4").sum().backward()
    assert kept, "nothing was compiled"  # the last is the gradient that comes in
    tokens = rows * config.block_size
    per_token = [x for x in kept[:-1] if tokens in (x.shape[:1].numel(), x.shape[:2].numel(), x.shape[-1:].numel())]
    # attention's output is among them twice, flat and by heads as the queries are: two views of one storage
    aliases = [x for x in per_token if x.shape[1:] == (config.n_head, config.head_size)][1:]
    sizes = [x.untyped_storage().nbytes() for x in per_token]
    return sum(sizes) - sum(x.nbytes for x in aliases) - cos.nbytes - sin.nbytes  # these all blocks share


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("mlp", "checkpointing"),
    [*itertools.product(("torch", "quack"), ("none", "selective", "full")), ("float8", "full")],
)
def test_what_a_compiled_block_keeps(mlp: Any, checkpointing: Any) -> None:
    """Equal on torch 2.13; releases differ a little in what they compute again. Float8's products on a CPU are others
    than a GPU's, whose memory tests/gpu/test_memory_plan.py compares."""
    settings = replace(DEBUG, activation_checkpointing=checkpointing, mlp="quack" if mlp == "float8" else mlp)
    wanted = kept_bytes_per_token(settings.config, settings) * 3 * settings.config.block_size
    kept = kept_by_the_compiler(settings.config, 3, checkpointing=checkpointing, mlp=mlp)
    assert kept == pytest.approx(wanted, rel=0.03)


def test_tokens_time_and_disk() -> None:
    """1024 x 2048 = 2,097,152 tokens a step; 100 steps at 1,000 tokens/s on each of 8 GPUs: 26,214.4 s = 0.30 days.

    A checkpoint: 12 bytes a parameter, 1,497,203,712; three of 100 steps stay of those every 10, and one is written.
    """
    settings = Settings(
        model_name="LLaMmlein_120M", max_steps=100, warmup_steps=1, save_interval_steps=10, keep_last_checkpoints=3,
        devices=4, num_nodes=2, plan=True, plan_tokens_per_s=1000,
    )  # fmt: skip
    settings.check()
    planned = plan(settings)
    assert (planned.input_tokens_per_step, planned.length.tokens) == (2_097_152, 209_715_200)
    assert (planned.checkpoint_bytes, planned.checkpoints) == (1_497_203_712, 4)
    text = "\n".join(lines(planned))
    assert "0.30 days, 58 GPU hours" in text
    assert "a copy of the weights on 8" in text
    assert (
        "added over ranks once a step (--gradient_sync); once a micro-batch the total is at most "
        f"{peak_bytes(settings.config, replace(planned.settings, gradient_sync='micro_batch'), 8, 8) / 2**30:.2f} GiB. "
        "A reduce-scatter sends 0.41 GiB a GPU, and a step has 16 micro-batches"  # 4 x 124,766,976 x 7 / 8 bytes
    ) in text
    assert "elsewhere plan with --mlp torch" in text
    assert "quack" not in "\n".join(lines(plan(replace(settings, mlp="torch"))))
    in_fp32 = replace(settings, precision="32-true")
    assert "not counted, for want of a measurement: attention's scores in fp32" in "\n".join(lines(plan(in_fp32)))
    assert plan(replace(settings, keep_last_checkpoints=0)).checkpoints == 11
    assert plan(replace(settings, keep_every_steps=15)).checkpoints == 7  # steps 30, 60 and 90 stay as well


def test_the_largest_micro_batch() -> None:
    """The largest divisor of a process's rows that fits, and no larger one does; none fits 1 GiB."""
    settings = Settings(model_name="LLaMmlein_1B", micro_batch_size=1, global_batch_size=96, plan=True)
    planned = plan(settings)
    assert planned.largest_micro_batch == 24
    for rows, fits in ((24, True), (32, False)):
        tried = replace(planned.settings, micro_batch_size=rows)
        assert (peak_bytes(settings.config, tried, 1, 1) <= 0.95 * 78.5 * 2**30) == fits
    assert plan(replace(settings, plan_gpu_gib=1.0)).largest_micro_batch is None
    with pytest.raises(BadInput, match="global_batch_size=96 rows is no multiple of 5"):
        plan(replace(settings, devices=5))


def test_the_program_plans_without_data_or_devices(store: Path, tmp_path: Path) -> None:
    """More processes than this machine has; the flag alone, and nothing is written."""
    arguments = command(
        store, tmp_path / "out", accelerator=None, devices=64, global_batch_size=256, val_data_dir=None, max_epochs=10
    )
    done = run_program([*arguments, "--plan"])
    assert done.returncode == 0, done.stderr
    assert "64 processes (1 nodes x 64), FULL_SHARD: a copy of the weights on 64" in done.stdout
    assert "epochs" in done.stdout
    assert not (tmp_path / "out").exists()
    nothing = command(store, tmp_path / "out", train_data_dir=None, val_data_dir=None)
    done = run_program([*nothing, "--plan"])
    assert done.returncode == 0, done.stderr
    assert "epochs" not in done.stdout
