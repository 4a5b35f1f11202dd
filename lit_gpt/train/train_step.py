"""One optimizer update: forward, backward, clipping, AdamW. The training loop and the step benchmark both run it.

Nothing here waits for the GPU: loss, gradient norm and verdict stay on the device until the caller reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_gpt.data.loader import Batch
from lit_gpt.launch.fabric import Fabric
from lit_gpt.train.optimizer import AdamW, gradient_norm, learning_rate
from lit_gpt.train.settings import StepSettings
from lit_gpt.train.sharding import prepare_next_backward, sum_shards_in_fp32
from lit_gpt.train.step_guard import StepGuard


class Update(NamedTuple):
    """What an update gives to log."""

    loss_sum: Tensor
    """This rank's loss in nats, summed over targets: fp32 scalar on the device."""
    grad_norm: Tensor
    """Global gradient norm before clipping, scalar on the device."""
    learning_rate: float
    verdict: Tensor
    """step_guard.Verdict as a scalar on the device: whether the update was applied, and if not, why."""


class TrainStep:
    """Updates `model` by `optimizer`. Every rank has one and makes the same calls."""

    def __init__(self, fabric: Fabric, model: nn.Module, optimizer: AdamW, settings: StepSettings) -> None:
        self._fabric = fabric
        self._model = model
        self._optimizer = optimizer
        self.settings = settings
        """max_steps: where the schedule ends."""
        self.device = fabric.device
        self.guard = StepGuard(settings, fabric.device)

    def update(self, step: int, batches: Sequence[Batch], targets: int) -> Update:
        """Do update number `step`, from 0, on this rank's micro-batches; targets: the step's, over all ranks."""
        lr = learning_rate(step, self.settings)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # FSDP averages gradients over ranks; the loss is a sum over all of them.
        scale = self._fabric.world_size / max(targets, 1)
        loss_sum = torch.zeros((), device=self._fabric.device)
        for batch in batches:
            last = batch is batches[-1]
            prepare_next_backward(self._model, self.settings, last=last)
            loss_sum += self._backward(batch, scale)
            if not last and self.settings.gradient_sync == "micro_batch":
                sum_shards_in_fp32(self._model)
        grad_norm = gradient_norm(self._model.parameters())
        verdict = self.guard.judge(grad_norm)
        self._optimizer.step_clipped(grad_norm, self.settings.grad_clip, skip=(verdict != 0).float())
        self._optimizer.zero_grad(set_to_none=True)
        return Update(loss_sum, grad_norm, lr, verdict)

    def _backward(self, batch: Batch, scale: float) -> Tensor:
        """Accumulate the gradients of one micro-batch; returns its summed loss.

        On return the autograd graph is freed, and with it what torch.compile keeps on its nodes beyond the backward
        pass: with float8, the transposed inputs of three GEMMs of each block.
        """
        loss = self.loss(batch)
        # 0 * loss is 0, or NaN where the loss is not finite: then every gradient is NaN, on every rank.
        self._fabric.backward(loss * (scale + 0 * loss.detach()))
        return loss.detach()

    def loss(self, batch: Batch) -> Tensor:
        """Summed loss of one micro-batch, in nats."""
        tokens, targets, cu_seqlens = (
            x.to(self._fabric.device, non_blocking=True) for x in (batch.tokens, batch.targets, batch.cu_seqlens)
        )
        return self._model(tokens.long(), cu_seqlens, targets.long())

    def next_logits(self, tokens: Tensor, cu_seqlens: Tensor, at: Tensor) -> Tensor:
        """Logits (B, V) of the token after position `at` (B,) of each row of tokens (B, T)."""
        return self._model(tokens, cu_seqlens, at=at)
