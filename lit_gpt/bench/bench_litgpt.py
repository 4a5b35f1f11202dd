"""A training step of Lightning-AI/litgpt, to measure ours against; what scripts/benchmark_litgpt.py prints.

The model, its initialisation, the chunked loss and the optimizer are litgpt's own, put together as its `pretrain`
command does: the whole model under torch.compile, Fabric's precision plugins, fused AdamW, clipping by Fabric. A row is
one document of random tokens, since litgpt does not mask documents. Its loader, log and schedule are left out, in its
favour. The host times each step and synchronises the device before and after, as litgpt's own log does.
"""

from __future__ import annotations

import statistics
import time
from importlib.metadata import version
from typing import Any, Literal

import torch
from lightning.fabric import Fabric

from lit_gpt.config import Config
from lit_gpt.train.speed_monitor import peak_flops

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
DISTINCT_BATCHES = 8


def shape_of(config: Config) -> dict[str, Any]:
    """The same model in litgpt's terms."""
    return dict(
        name=config.name, block_size=config.block_size, vocab_size=config.vocab_size,
        padded_vocab_size=config.padded_vocab_size, n_layer=config.n_layer, n_head=config.n_head,
        n_query_groups=config.n_query_groups, n_embd=config.n_embd, intermediate_size=config.intermediate_size,
        rotary_percentage=1.0, rope_base=int(config.rope_base), parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=config.norm_eps, mlp_class_name="LLaMAMLP",
    )  # fmt: skip


class LitgptBench:
    """litgpt's model of our shape, and its optimizer, on one device."""

    def __init__(self, config: Config, *, precision: Precision, rows: int, accelerator: str, seed: int = 0) -> None:
        import litgpt
        from litgpt.pretrain import initialize_weights
        from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

        torch.set_float32_matmul_precision("high")  # as litgpt's command line does
        self.fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
        self.fabric.launch()
        self.fabric.seed_everything(seed, verbose=False)
        self.device = self.fabric.device
        with self.fabric.init_module(empty_init=True):
            model = litgpt.GPT(litgpt.Config(**shape_of(config)))
        initialize_weights(self.fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        compiled: Any = torch.compile(model)
        self.model = self.fabric.setup(compiled)
        optimizer = instantiate_torch_optimizer("AdamW", self.model.parameters(), fused=self.device.type == "cuda")
        self.optimizer: Any = self.fabric.setup_optimizers(optimizer)
        self.loss = chunked_cross_entropy
        size = (DISTINCT_BATCHES, rows, config.block_size + 1)
        self.tokens = torch.randint(0, config.vocab_size, size, device=self.device)
        self.steps = 0

    def step(self) -> torch.Tensor:
        """One update; the mean loss, on the device."""
        tokens = self.tokens[self.steps % DISTINCT_BATCHES]
        loss: torch.Tensor = self.loss(self.model(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous())
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.detach()

    def timed_step(self) -> float:
        """Seconds of one update."""
        self.synchronize()
        started = time.perf_counter()
        self.step()
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    config: Config, *, precision: Precision, rows: int, steps: int, warmup: int, accelerator: str
) -> dict[str, Any]:
    """The line that the program prints."""
    started = time.perf_counter()
    bench = LitgptBench(config, precision=precision, rows=rows, accelerator=accelerator)
    assert bench.parameters == config.parameters, f"litgpt's model has {bench.parameters} weights, not the shape's"
    bench.timed_step()
    first_step_s = time.perf_counter() - started
    for _ in range(warmup - 1):
        bench.step()
    cuda = bench.device.type == "cuda"
    if cuda:
        bench.synchronize()
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds = [bench.timed_step() for _ in range(steps)]
    loss = bench.step().item()
    median = statistics.median(seconds)
    rate = rows * config.block_size / median
    line: dict[str, Any] = {
        "what": "litgpt step", "size": config.name, "precision": precision, "rows": rows, "value": round(rate),
        "unit": "tokens/s", "ms": round(median * 1e3, 2), "spread": round((max(seconds) - min(seconds)) / median, 3),
        "first_step_s": round(first_step_s, 1), "loss": round(loss, 4),
    }  # fmt: skip
    if cuda:
        name = torch.cuda.get_device_name(bench.device)
        line |= {"memory_gib": round(torch.cuda.max_memory_allocated(bench.device) / 2**30, 2), "device": name}
        if peak := peak_flops(name):
            line["mfu_palm"] = round(rate * config.flops_per_token(with_embedding=True) / peak, 4)
    return line | {"versions": {name: version(name) for name in ("litgpt", "torch", "lightning")}}
