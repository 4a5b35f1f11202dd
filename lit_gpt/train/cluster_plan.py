"""How fast a step would be on more GPUs than can be tried, and what is left of it when some fail. By calculation.

A step is the computation of one GPU, known from a measured rate, plus

- what transfers add. FULL_SHARD gathers the weights twice a micro-batch (SHARD_GRAD_OP: once a step) and
  reduce-scatters fp32 gradients; copies of the weights all-reduce them. Transfers run beside the computation, but share
  memory, multiprocessors and power with it: SLOWED of their time is added, and all that is longer than the computation.
- the wait for the slowest of N ranks: the expected largest of N normal times, about SPREAD sqrt(2 ln N) of the mean.
- less what each rank saves as it updates its shard only.

SLOWED and SPREAD were fitted to six measurements on four H100s, of which the largest error is 2.5 %; on several nodes
nothing was measured here. docs/benchmark_log.md has them, and the prediction beside what others have published. A ring
passes each byte once over every link: inside a node at NODE_BYTES_PER_S, and between nodes over the ports of all GPUs
of a node together.

Failures are a Poisson process. The time between saves is Daly's (doi:10.1016/j.future.2004.11.016), which for rare
failures is Young's, sqrt(2 x save x time between failures) (doi:10.1145/361147.361115).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from lit_gpt.config import Config
from lit_gpt.train.muon_plan import MESSAGE_S, NODE_BYTES_PER_S, muon_step
from lit_gpt.train.settings import Settings

MOST_GPUS = 1024
USUAL_MFU = {"none": 0.65, "tensorwise": 0.83, "rowwise": 0.57}
"""Of one H100, by PaLM's rule, by --float8 (docs/benchmarks.md); of bf16's peak."""
PEAK_FLOPS = 989.4e12
SLOWED = 0.6
SPREAD = 0.005
REACHED = 0.8
"""Share of a port's nominal rate that collectives reach."""
UPDATE_BYTES_PER_S = 2.7e12
"""Of AdamW's kernel, read and written."""


class ClusterStep(NamedTuple):
    """Seconds of a step, and what they are made of."""

    gpus: int
    micro_batches: int
    computation_s: float
    transfers_s: float
    """Of all transfers, most of which run beside the computation."""
    added_s: float
    """What they add."""
    spread_s: float
    update_s: float
    """What the sharded update adds; below 0: saves."""

    @property
    def total_s(self) -> float:
        return self.computation_s + self.added_s + self.spread_s + self.update_s

    @property
    def efficiency(self) -> float:
        """Tokens a second of a GPU, over those of one alone."""
        return self.computation_s / self.total_s


class Goodput(NamedTuple):
    """What failures leave of the time."""

    days_between_failures: float
    interval_s: float
    """Seconds between saves that lose least."""
    share: float
    """Of the time that becomes training which stays."""


def one_gpu_tokens_per_s(config: Config, settings: Settings) -> float | None:
    """--plan_tokens_per_s, else that of an H100 at its usual MFU; None where nothing was measured."""
    if settings.plan_tokens_per_s is not None:
        return settings.plan_tokens_per_s
    if settings.precision == "32-true":
        return None
    return USUAL_MFU[settings.float8] * PEAK_FLOPS / config.flops_per_token(with_embedding=True)


def cluster_step(config: Config, settings: Settings, nodes: int, tokens_per_s: float) -> ClusterStep:
    """Of `nodes` nodes of --devices GPUs each; tokens_per_s: of one GPU alone."""
    devices = settings.devices or 1
    gpus = devices * nodes
    shards = settings.shards(devices, gpus)
    micro_batches = settings.global_batch_size // (settings.micro_batch_size * gpus)
    computation = micro_batches * settings.micro_batch_size * config.block_size / tokens_per_s
    transfers = _transfers_s(config, settings, nodes, shards, micro_batches)
    added = SLOWED * min(transfers, computation) + max(0.0, transfers - computation)
    spread = SPREAD * math.sqrt(2 * math.log(gpus)) * computation
    return ClusterStep(
        gpus, micro_batches, computation, transfers, added, spread, _update_s(config, settings, nodes, shards)
    )


def _transfers_s(config: Config, settings: Settings, nodes: int, shards: int, micro_batches: int) -> float:
    devices, units = settings.devices or 1, config.n_layer + 1
    port = settings.plan_network_gb_per_s * 1e9 * REACHED
    whole_node = NODE_BYTES_PER_S if nodes == 1 else min(NODE_BYTES_PER_S, devices * port)
    shard_rate = NODE_BYTES_PER_S if shards <= devices else whole_node
    gathers = 2 * micro_batches if settings.reshards_after_forward else 1
    reductions = micro_batches if settings.gradient_sync == "micro_batch" else 1
    gathered = (4 if settings.precision == "32-true" else 2) * config.parameters
    sharing = (shards - 1) / shards
    seconds = sharing * (gathers * gathered + reductions * 4 * config.parameters) / shard_rate
    seconds += (gathers + reductions) * units * (shards - 1) * MESSAGE_S
    copies = devices * nodes // shards
    if copies > 1:
        same_shard = devices / min(shards, devices)  # ranks of a node, whose ring goes over as many ports
        copy_rate = NODE_BYTES_PER_S if nodes == 1 else min(NODE_BYTES_PER_S, same_shard * port)
        seconds += 2 * (copies - 1) / copies * 4 * config.parameters / shards / copy_rate
        seconds += 2 * units * (copies - 1) * MESSAGE_S
    return seconds


def _update_s(config: Config, settings: Settings, nodes: int, shards: int) -> float:
    """What the update takes with this many shards, less what it takes on one GPU."""
    number_bytes = 7 * (2 if settings.precision == "bf16-true" else 4)  # reads w, g, m, v; writes w, m, v
    saved = number_bytes * config.parameters / UPDATE_BYTES_PER_S * (1 - 1 / shards)
    if settings.optimizer != "muon" or settings.precision == "32-true":
        return -saved
    inside = shards <= (settings.devices or 1)
    rate = NODE_BYTES_PER_S if inside else settings.plan_network_gb_per_s * 1e9
    return muon_step(config, shards, number_bytes=2, bytes_per_s=rate).seconds - saved


def goodput(gpus: int, settings: Settings, checkpoint_bytes: int) -> Goodput:
    """Training waits for --plan_save_s at a save, and for --plan_restart_s at a failure, which loses the time since the
    newest published save; the save that is being written at the time is lost, too."""
    between = 86400 / (gpus * settings.plan_failures_per_gpu_day)
    save = settings.plan_save_s
    interval = daly_interval(save, between)
    nodes = -(-gpus // (settings.devices or 1))
    written = checkpoint_bytes / (nodes * settings.plan_storage_gb_per_s * 1e9)
    restart = settings.plan_restart_s + written  # lost beside the restart: what was trained while a save was written
    whole = between * math.exp(restart / between) * math.expm1((interval + save) / between)
    return Goodput(between / 86400, interval, interval / whole)


def daly_interval(save_s: float, between_s: float) -> float:
    """Seconds of training between two saves of save_s that lose least, if failures are between_s apart on average."""
    if save_s >= 2 * between_s:
        return between_s
    ratio = save_s / (2 * between_s)
    return math.sqrt(2 * save_s * between_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def cluster_lines(config: Config, settings: Settings, checkpoint_bytes: int) -> Iterator[str]:
    """The prediction as text: the run's own step, and how the same batch would do on other numbers of nodes."""
    tokens_per_s, devices = one_gpu_tokens_per_s(config, settings), settings.devices or 1
    if tokens_per_s is None:
        yield "a step on several GPUs: give a GPU's tokens/s by --plan_tokens_per_s"
        return
    source = "" if settings.plan_tokens_per_s else ", usual of an H100"
    yield "several GPUs, predicted from these assumptions:"
    yield f"  {tokens_per_s:,.0f} tokens/s of one GPU alone (--plan_tokens_per_s{source})"
    yield (
        f"  {NODE_BYTES_PER_S / 1e9:.0f} GB/s a GPU inside a node; {settings.plan_network_gb_per_s:g} GB/s a GPU "
        f"between nodes (--plan_network_gb_per_s), of which {REACHED:.0%} are reached"
    )
    yield (
        f"  {SLOWED:.0%} of the transfers' time is added to a step, and {SPREAD:.1%} x sqrt(2 ln GPUs) for the slowest "
        "rank: fitted on 4 GPUs of one node, not measured on several"
    )
    yield (
        f"  {settings.plan_failures_per_gpu_day:g} failures a GPU and day (--plan_failures_per_gpu_day); "
        f"{settings.plan_restart_s:g} s until it trains again (--plan_restart_s)"
    )
    yield (
        f"  a save makes training wait for {settings.plan_save_s:g} s (--plan_save_s), and is written at "
        f"{settings.plan_storage_gb_per_s:g} GB/s a node (--plan_storage_gb_per_s)"
    )
    yield "     GPUs  micro-  step, s  transfers,  tokens/s  effi-   days between    best save  good-"
    yield "          batches                    s     a GPU  ciency      failures  every, steps   put"
    rows = settings.global_batch_size // settings.micro_batch_size
    nodes = sorted({settings.num_nodes, *(2**n for n in range(11))})
    for count in (n for n in nodes if n * devices <= max(MOST_GPUS, settings.num_nodes * devices)):
        if rows % (count * devices) or (settings.shard_group_size or 1) > count * devices:
            continue
        step, left = (
            cluster_step(config, settings, count, tokens_per_s),
            goodput(count * devices, settings, checkpoint_bytes),
        )
        here = ">" if count == settings.num_nodes else " "
        yield (
            f"{here}{step.gpus:7}{step.micro_batches:8}{step.total_s:9.3f}{step.transfers_s:12.3f}"
            f"{tokens_per_s * step.efficiency:10,.0f}{step.efficiency:8.3f}{left.days_between_failures:14.1f}"
            f"{max(1, round(left.interval_s / step.total_s)):17,}{left.share:6.3f}"
        )
