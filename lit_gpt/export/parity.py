"""Check that transformers' model and ours compute the same with the same weights: logits in fp32, on real text.

Each model runs once. Transformers finds and loads the folder's weights itself, so the proof does not share a reader
with what it proves. Ours is built on the meta device: the weights of a piece (the embedding, one block, the final norm,
the output projection) are read when the forward pass reaches it. On both sides a piece is converted to fp32 when it
runs, and dropped afterwards.
Cost: one forward pass on each side; memory for the weights as stored (7B in bf16: 14 GB) and for the largest piece in
fp32 (7B: 0.8 GB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.model.gpt import GPT

BOUND = 1e-5
"""Largest allowed difference of two logits, relative to the largest logit: a few rounding errors of fp32."""

GERMAN_TEXT = (
    "Im Morgengrauen zog die Schäferin mit ihren Lämmern über die Mainbrücke. Der Nebel lag noch über den Weinbergen, "
    "und aus der Stadt hörte man nur die Glocken von drei Türmen. »Größere Herden«, sagte sie, »brauchen mehr Geduld, "
    "nicht mehr Lärm.« Um 8:30 Uhr hatte sie bereits 12 Kilometer zurückgelegt; das Gras am Fluss war nass, die Tiere "
    "fraßen ruhig, und niemand außer einem müden Bäckerlehrling blickte ihnen nach.\nAm Abend schrieb sie in ihr Heft: "
    "Wer zählen kann, verliert kein Lamm. Wer zuhören kann, findet auch das, das sich im Schilf versteckt hat."
)
"""Written for this project; compared on where there is no validation set."""

Fetch = Callable[[list[str]], dict[str, Tensor]]
"""Gives the weights of a piece by name; each name is asked for once, in the model's order."""

SAMPLE_TOKENS = 256
"""Tokens to compare logits on."""


class Reference:
    """transformers' reading of a folder. The program hands in the module, as the library does not import it."""

    def __init__(self, transformers: ModuleType) -> None:
        self._transformers = transformers

    def logits(self, folder: Path, dtype: torch.dtype, tokens: Tensor) -> Tensor:
        """The logits (T, V) in fp32 of the folder's model, whose weights are stored as `dtype`, for tokens (T,).

        Transformers finds and loads the weights; BadInput if it cannot.
        """
        self._transformers.utils.logging.disable_progress_bar()
        try:
            model = self._transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # noqa: BLE001 - transformers raises any class for a folder that it cannot load
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"transformers cannot load {folder}: {reason}") from None
        model.config.use_cache = False
        weights = model.state_dict()
        return logits(model, lambda names: {name: weights.pop(name) for name in names}, tokens)

    def encoder(self, folder: Path) -> Callable[[str], Sequence[int]]:
        """The folder's tokenizer, called as a user calls it; BadInput if transformers cannot read it, or only by the
        folder's own code, which is never run nor asked about."""
        try:
            tokenizer = self._transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 (the library raises any kind)
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"transformers cannot read the tokenizer of {folder}: {reason}") from None
        return lambda text: tokenizer(text, verbose=False).input_ids  # no warning about texts longer than the context


class Parity(NamedTuple):
    """How far apart the logits of two models are."""

    difference: float
    """Largest difference of two logits, divided by the largest logit."""
    largest_logit: float
    tokens: int
    """Positions compared."""

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.1e} of the largest logit, {self.largest_logit:.4g} "
            f"(bound {BOUND:g}), {self.tokens} tokens"
        )


def our_logits(config: Config, tensors: Iterable[tuple[str, Tensor]], tokens: Tensor) -> Tensor:
    """Our model's logits (T, V) in fp32 for tokens (T,), its weights streamed."""
    with torch.device("meta"):
        model = GPT(config)
    return logits(model, fetch_from(tensors), tokens)


def logits(model: nn.Module, fetch: Fetch, tokens: Tensor) -> Tensor:
    """Logits (T, V) in fp32 of `model`, built on the meta device, for tokens (T,)."""
    handles = []
    for prefix, piece in pieces(model):
        handles.append(piece.register_forward_pre_hook(_loader(prefix, fetch)))
        handles.append(piece.register_forward_hook(_dropper))
    model.eval()
    try:
        with torch.inference_mode():
            output = model(tokens[None])
    finally:
        for handle in handles:
            handle.remove()
    return getattr(output, "logits", output)[0]


def pieces(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each piece, which is loaded as a whole: every element of a ModuleList, and outside of these
    every module that holds weights itself."""
    listed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(listed) and listed:
            continue
        if isinstance(module, nn.ModuleList):
            yield from ((f"{name}.{i}", element) for i, element in enumerate(module))
            listed += (f"{name}.",)
        elif next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _loader(prefix: str, fetch: Fetch) -> Callable[[nn.Module, Any], None]:
    def load(module: nn.Module, _inputs: Any) -> None:
        names = list(module.state_dict())
        found = fetch([f"{prefix}.{name}" for name in names])
        values = {name: found[f"{prefix}.{name}"].float() for name in names}
        module.load_state_dict(values, strict=True, assign=True)

    return load


def _dropper(module: nn.Module, _inputs: Any, _output: Any) -> None:
    for parameter_holder in module.modules():
        for name, parameter in parameter_holder.named_parameters(recurse=False):
            setattr(parameter_holder, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def fetch_from(stream: Iterable[tuple[str, Tensor]]) -> Fetch:
    """Fetch from a stream of (name, tensor) in roughly the model's order; what comes too early is kept in memory."""
    source, waiting = iter(stream), dict[str, Tensor]()

    def fetch(names: list[str]) -> dict[str, Tensor]:
        while not waiting.keys() >= set(names):
            waiting.update([next(source)])
        return {name: waiting.pop(name) for name in names}

    return fetch


def compare(ours: Tensor, theirs: Tensor) -> Parity:
    """Compare logits (T, V); BadInput above BOUND. Where one side has no padding, the other's is ignored."""
    vocabulary = min(ours.shape[1], theirs.shape[1])
    largest = ours[:, :vocabulary].abs().max().item()
    difference = (ours[:, :vocabulary] - theirs[:, :vocabulary]).abs().max().item() / (largest or 1.0)
    parity = Parity(difference, largest, len(ours))
    if not difference <= BOUND:  # NaN, too
        raise BadInput(f"the logits of both sides differ: {parity}; nothing was published")
    return parity
