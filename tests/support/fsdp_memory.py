"""Prints a JSON list with, for each rank, the bytes that FSDP2 holds in a training step and the numbers of its gradient
reductions and all-gathers.

python tests/support/fsdp_memory.py '{"devices": 2, "sharding_strategy": "FULL_SHARD", ...}'    (values of StepSettings)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_param_group  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from lit_gpt.bench.bench_step import StepBench  # noqa: E402
from lit_gpt.train.settings import StepSettings  # noqa: E402


def size(tensors: Iterable[Tensor | None]) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    return sum(t.numel() * t.element_size() for t in local)


def fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                yield from group.fsdp_params


def partial_sums(model: nn.Module) -> Iterator[Tensor | None]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                yield group._partial_reduce_output


def main() -> None:
    settings = StepSettings(**json.loads(sys.argv[1]))
    bench = StepBench(settings)
    model, optimizer = bench.model, bench.optimizer
    found: dict[str, int] = {"whole": 0, "accumulated": 0, "reductions": 0, "gathers": 0}

    def count(what: str, name: str) -> None:
        whole = getattr(_fsdp_param_group, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            found[what] += 1
            return whole(*arguments, **more)

        setattr(_fsdp_param_group, name, counted)

    count("reductions", "foreach_reduce")
    count("gathers", "foreach_all_gather")

    def before_the_last_block(*_: object) -> None:
        parameters = list(fsdp_parameters(model))
        found["whole"] = size(p.unsharded_param for p in parameters if p.sharded_state.name == "UNSHARDED")
        summed = [p.unsharded_accumulated_grad for p in parameters]
        kept = [getattr(p, "_unsharded_param", None) for p in parameters]
        whole = [*summed, *(p.grad for p in kept if p is not None)]
        found["accumulated"] = size([*whole, *(p.sharded_param.grad for p in parameters), *partial_sums(model)])

    def at_the_update(*arguments: Any, **more: Any) -> None:
        found["gradients"] = size(p.grad for p in model.parameters())
        update(*arguments, **more)

    model.module.transformer.h[-1].register_forward_pre_hook(before_the_last_block)
    update, optimizer.step_clipped = optimizer.step_clipped, at_the_update  # type: ignore[method-assign]
    micro_batches = settings.global_batch_size // (settings.micro_batch_size * bench.fabric.world_size)
    bench.train_step.update(0, bench._steps[0][:micro_batches], 1)
    found["weights"] = size(model.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    found["optimizer"] = size(moments)
    of_all: list[dict[str, int]] = [{}] * bench.fabric.world_size
    torch.distributed.all_gather_object(of_all, found)
    if bench.fabric.is_global_zero:
        print(json.dumps(of_all))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
