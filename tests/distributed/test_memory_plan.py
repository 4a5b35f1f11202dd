"""The memory plan for several processes equals what FSDP2 holds on each rank, to the byte (gloo, CPU); and how
often a step reduces its gradients and gathers weights.

The sizes of weights, gradients and moments do not depend on the device. What a GPU adds is not tested here: the
prefetched block and its all-gather buffer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lit_gpt.train.memory_plan import step_memory
from lit_gpt.train.resolve import resolve_for_plan
from lit_gpt.train.settings import StepSettings
from tests.support.programs import ROOT, environment

pytestmark = pytest.mark.distributed

SMALL = dict(model_name="debug", block_size=64, devices=2, accelerator="cpu", train_data_dir="(random tokens)")


@pytest.mark.parametrize(
    "changed",
    [
        dict(sharding_strategy="FULL_SHARD", precision="bf16-mixed", global_batch_size=4, micro_batch_size=1),
        dict(sharding_strategy="SHARD_GRAD_OP", precision="bf16-true", global_batch_size=4, micro_batch_size=2),
        dict(sharding_strategy="NO_SHARD", precision="32-true", global_batch_size=4, micro_batch_size=2),
        dict(gradient_sync="micro_batch", precision="bf16-true", global_batch_size=6, micro_batch_size=1),
        dict(
            gradient_sync="micro_batch",
            sharding_strategy="HYBRID_SHARD",
            shard_group_size=2,
            precision="bf16-true",
            optimizer="muon",
            global_batch_size=4,
            micro_batch_size=1,
        ),
    ],
    ids=lambda changed: "-".join(str(changed[x]) for x in ("sharding_strategy", "gradient_sync") if x in changed),
)
def test_what_a_rank_holds(changed: dict[str, Any]) -> None:
    values = SMALL | changed
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "fsdp_memory.py"), json.dumps(values)],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = resolve_for_plan(StepSettings(**values))
    forward, _, update = step_memory(settings.config, settings, 2, settings.shards(2, 2))
    block = settings.config.block_parameters * (4 if settings.precision == "32-true" else 2)
    micro_batches, blocks = settings.global_batch_size // (2 * settings.micro_batch_size), settings.config.n_layer
    reductions = 1 if settings.gradient_sync == "step" else micro_batches
    gathers = {"SHARD_GRAD_OP": blocks + 1, "NO_SHARD": 0}
    on_a_gpu = (2 if settings.reshards_after_forward else 1) * block  # the buffer; and the block fetched ahead
    planned = {
        "weights": update.weights,
        "gradients": update.gradients,
        "optimizer": update.optimizer,
        "accumulated": forward.gradients,
        "whole": forward.compute_weights - on_a_gpu,
        "reductions": (blocks + 1) * reductions,  # of each unit
        "gathers": gathers.get(settings.sharding_strategy, micro_batches * (2 * blocks + 1)),
    }
    assert json.loads(done.stdout.splitlines()[-1]) == [planned, planned]  # before it: what gloo says in torch 2.10
