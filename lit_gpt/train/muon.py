"""Muon (https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks, AdamW for the other weights.

A matrix moves by its Nesterov momentum with all singular values set to about 1: by the orthogonal matrix nearest to
it. Times 0.2 sqrt(max(rows, columns)), the root mean square of such an update is 0.2, as is usual of AdamW's: so one
learning rate and one weight decay serve both (arXiv:2502.16982). Layers' matrices that are stacked in one weight (q, k,
v; gate, up) are orthogonalized each for itself. There is one buffer of state a weight, where AdamW has two.

The orthogonal matrix comes from Polar Express (arXiv:2505.16932), five products of polynomials, in the dtype in which
the model computes. Equal shapes go through it together, at most BATCH_NUMBERS numbers at a time, so that it needs
little memory beside the weights.

Sharded over ranks, each matrix is orthogonalized by one rank: matrix_exchange.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gpt.train.adamw import AdamW, RoundingAdamW, clipping_factor, local_shard, zero_state
from lit_gpt.train.matrix_exchange import Matrix, MatrixExchange
from lit_gpt.train.rounding import hashed, random_bits, shifted, stochastic_round

BATCH_NUMBERS = 1 << 26
"""Of the matrices that a rank orthogonalizes at a time, if a single one is not larger."""
UPDATE_RMS = 0.2
"""Root mean square of an update at a learning rate of 1; AdamW's are 0.2 to 0.4 (arXiv:2502.16982, section 2.2)."""
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""a, b, c of the polynomials a x + b x^3 + c x^5 of singular values: the paper's method for 5 iterations, with a safety
factor of 1.02 for bf16."""
SAFETY = 1.02


class _Part(NamedTuple):
    """This rank's rows of a matrix."""

    weight: Tensor
    place: slice
    """In the rank's flat shard of the weight."""
    start: Tensor
    """Hash input of the first number (rounding.py)."""

    @property
    def numbers(self) -> int:
        return self.place.stop - self.place.start


class Muon(AdamW):
    """The first parameter group is Muon's: its weights are those of `matrices`; "momentum", "cautious" are its options.

    AdamW sees no gradients of these weights.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: Sequence[Matrix],
        *,
        dtype: torch.dtype,
        compiled: bool,
        **adam: Any,
    ) -> None:
        """dtype: in which matrices are orthogonalized, and sent to other ranks."""
        super().__init__(groups, compiled=compiled, **adam)
        self.make_state()
        self._dtype = dtype
        self._momentum_step: Callable[..., None] = momentum_step
        self._weight_step: Callable[..., None] = weight_step
        if compiled:
            self._momentum_step = torch.compile(momentum_step, fullgraph=True, dynamic=False)
            self._weight_step = torch.compile(weight_step, fullgraph=True, dynamic=False)
        for weight in self.param_groups[0]["params"]:
            self._start(weight)  # which numbers the weights: alike on any number of ranks
        self._rounds = [
            (exchange, [self._part(matrix, exchange) for matrix in exchange.matrices])
            for same in _by_shape(matrices).values()
            for exchange in MatrixExchange.rounds(same, BATCH_NUMBERS)
        ]

    def make_state(self) -> None:
        for weight in self.param_groups[0]["params"]:
            if weight not in self.state:
                self.state[weight] = zero_state(weight, "momentum_buffer")
        super().make_state()

    def _part(self, matrix: Matrix, exchange: MatrixExchange) -> _Part:
        shard, rows = exchange.shard_rows(matrix), exchange.own_rows(matrix)
        first, columns = (rows.start - shard.start) * matrix.columns, matrix.columns
        place = slice(first, first + len(rows) * columns)
        return _Part(matrix.weight, place, self._start(matrix.weight) + first)

    @torch.no_grad()
    def step_clipped(self, norm: Tensor, max_norm: float, skip: Tensor) -> None:
        self._step_matrices(clipping_factor(norm, max_norm), skip)
        for weight in self.param_groups[0]["params"]:
            weight.grad = None
        super().step_clipped(norm, max_norm, skip)

    @torch.profiler.record_function("Optimizer.step#Muon")  # a profiler event as PyTorch's optimizers have it
    def _step_matrices(self, clip: Tensor, skip: Tensor) -> None:
        group = self.param_groups[0]
        counts = [self.state[weight]["step"] for weight in group["params"]]
        torch._foreach_add_(counts, [1 - skip] * len(counts))  # a list of tensors: with a number, the host would wait
        draw = hashed(counts[0].int())  # the count is the same for all weights
        keep = torch.full((), 1 - group["lr"] * group["weight_decay"], device=skip.device)
        for exchange, parts in self._rounds:
            # nested, so that each tensor is freed with its last use
            updates = exchange.scatter(orthogonalized(exchange.gather(self._updates(parts, draw, clip, skip))))
            rate = torch.full((), group["lr"] * UPDATE_RMS * math.sqrt(max(exchange.shape)), device=skip.device)
            for part, update in zip(parts, _split(updates, parts), strict=True):
                weight = local_shard(part.weight)[part.place]
                self._weight_step(weight, update, part.start, draw, rate, keep, skip, cautious=group["cautious"])

    def _updates(self, parts: Sequence[_Part], draw: Tensor, clip: Tensor, skip: Tensor) -> Tensor:
        """Nesterov's momentum of the parts, one after another, after it has moved."""
        updates = torch.empty(sum(part.numbers for part in parts), dtype=self._dtype, device=skip.device)
        decay = self.param_groups[0]["momentum"]
        for part, update in zip(parts, _split(updates, parts), strict=True):
            momentum = self.state[part.weight]["momentum_buffer"]
            assert part.weight.grad is not None
            shards = (local_shard(x)[part.place] for x in (momentum, part.weight.grad))
            self._momentum_step(*shards, update, part.start, draw, clip, skip, decay=decay)
        return updates


class RoundingMuon(Muon, RoundingAdamW):
    """For bf16 weights, momentum and moments."""


def _split(updates: Tensor, parts: Sequence[_Part]) -> tuple[Tensor, ...]:
    return updates.split([part.numbers for part in parts])


def momentum_step(
    momentum: Tensor, gradient: Tensor, update: Tensor, start: Tensor, draw: Tensor, clip: Tensor, skip: Tensor, *,
    decay: float,
) -> None:  # fmt: skip
    """Move momentum (n,) towards gradient * clip, unless skip is 1, and write Nesterov's mean of the two to update.

    Scalars are on the device, so that one compilation serves all steps. start, draw: for random_bits.
    """
    g = gradient.float() * clip
    m = momentum.float()
    m = m + (1 - decay) * (g - m)
    update.copy_(g + decay * (m - g))
    if momentum.dtype == torch.bfloat16:
        m = stochastic_round(m, shifted(random_bits(len(momentum), start, draw), 16))
    momentum.copy_(torch.where(skip == 0, m, momentum))


def weight_step(
    weight: Tensor, update: Tensor, start: Tensor, draw: Tensor, rate: Tensor, keep: Tensor, skip: Tensor, *,
    cautious: bool,
) -> None:  # fmt: skip
    """weight (n,) * keep - rate * update in place, unless skip is 1; scalars as for momentum_step.

    keep: the share of a weight that weight decay leaves. cautious: of weights that the update brings nearer to 0; it
    leaves the others whole (arXiv:2510.12402).
    """
    w, u = weight.float(), update.float()
    kept = torch.where(u * w > 0, keep, 1.0) if cautious else keep
    w = w * kept - rate * u
    if weight.dtype == torch.bfloat16:
        w = stochastic_round(w, random_bits(len(weight), start, draw))
    weight.copy_(torch.where(skip == 0, w, weight))


def orthogonalized(x: Tensor) -> Tensor:
    """The matrices x (B, R, C), which are overwritten, with their singular values set to about 1.

    Those above a thousandth of the Frobenius norm come out between 0.84 and 1.15, smaller ones nearer to 0.
    """
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x.div_(norm.clamp(min=1e-12) * SAFETY)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for a, b, c in POLAR_EXPRESS:
        square = torch.bmm(x, x.mT)
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        square.diagonal(dim1=1, dim2=2).add_(a)  # baddbmm, with a x, would copy x first
        x = torch.bmm(square, x)
    return x.mT if tall else x


def _by_shape(matrices: Sequence[Matrix]) -> dict[tuple[int, int], list[Matrix]]:
    found: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        found[matrix.rows, matrix.columns].append(matrix)
    return found
