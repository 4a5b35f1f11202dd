"""Text that the running model writes: a look at what it learns, beside the loss.

Every rank runs the same forward passes, which is what sharded weights need; rank 0 draws and tells the others. Prompts
fill the rows of a micro-batch of full length, so that compiled blocks meet the shapes that they know. Nothing of the
training changes: no gradient, no state, a random generator of its own that depends on seed and step alone.
Costs: `sample_tokens` forward passes of a micro-batch (no cache of keys and values), for each micro-batch of prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.data.loader import full_rows
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.train.settings import SamplingSettings

# Shapes: B rows of a micro-batch, T block_size, V vocabulary.


class Prompts(NamedTuple):
    """What is continued."""

    tokenizer: Tokenizer
    texts: list[str]
    ids: list[list[int]]
    """Of each text, with the BOS that the training data has."""


class Sample(NamedTuple):
    """What the model made of one prompt."""

    prompt: str
    text: str
    """The continuation alone."""
    tokens: int
    ended: bool
    """The model ended the document by itself."""


def open_prompts(
    settings: SamplingSettings, tokenizer_path: str | None, block_size: int, *, add_bos: bool
) -> Prompts | None:
    """The settings' prompts, encoded; None where nothing is to be sampled, BadInput where a prompt does not fit."""
    if settings.sample_interval_steps == 0:
        return None
    if tokenizer_path is None:
        raise BadInput("--sample_interval_steps needs --tokenizer_path: prompts are text")
    tokenizer = Tokenizer.from_folder(tokenizer_path)
    bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    ids = [bos + tokenizer.encode(text) for text in settings.sample_prompts]
    for text, prompt in zip(settings.sample_prompts, ids, strict=True):
        if not prompt:
            raise BadInput(f"--sample_prompts: {text!r} holds no token to begin with")
        if len(prompt) + settings.sample_tokens > block_size:
            raise BadInput(
                f"--sample_prompts: {text!r} is {len(prompt)} tokens, which with --sample_tokens "
                f"{settings.sample_tokens} exceed the model's {block_size}"
            )
    return Prompts(tokenizer, list(settings.sample_prompts), ids)


@torch.no_grad()
def sample(
    next_logits: Callable[[Tensor, Tensor, Tensor], Tensor],
    prompts: Prompts,
    settings: SamplingSettings,
    *,
    rows: int,
    block_size: int,
    vocab_size: int,
    seed: int,
    step: int,
    device: torch.device,
) -> list[Sample]:
    """A continuation of each prompt, the same on every rank; all ranks call it.

    next_logits(tokens (B, T), cu_seqlens, at (B,)) gives the logits (B, V) behind the positions `at`.
    """
    generator = torch.Generator().manual_seed((seed << 32) + step)
    cu_seqlens = full_rows(rows, block_size).to(device)
    samples: list[Sample] = []
    for start in range(0, len(prompts.ids), rows):
        group = prompts.ids[start : start + rows]
        tokens = torch.zeros(rows, block_size, dtype=torch.int64)
        for row, prompt in enumerate(group):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in group] + [1] * (rows - len(group)))
        ended = torch.arange(rows) >= len(group)
        for _ in range(settings.sample_tokens):
            logits = next_logits(tokens.to(device), cu_seqlens, (lengths - 1).to(device))
            drawn = _draw(logits[:, :vocab_size].float().cpu(), settings.sample_temperature, generator)
            if dist.is_initialized():
                dist.broadcast(drawn, src=0)
            going_on = ~ended
            ended |= drawn == prompts.tokenizer.eos_id
            written = going_on & ~ended
            tokens[written, lengths[written]] = drawn[written]
            lengths += written
            if ended.all():
                break
        samples += _decoded(prompts, start, tokens, lengths, ended)
    return samples


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(B,) ids: the likeliest, or drawn at `temperature`."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


def _decoded(prompts: Prompts, start: int, tokens: Tensor, lengths: Tensor, ended: Tensor) -> Iterator[Sample]:
    """Decoded together with the prompt, so that a letter of several tokens across the border stays whole."""
    for row, number in enumerate(range(start, min(start + len(tokens), len(prompts.ids)))):
        prompt, ids = prompts.ids[number], tokens[row, : lengths[row]].tolist()
        before, whole = prompts.tokenizer.decode(prompt), prompts.tokenizer.decode(ids)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        yield Sample(prompts.texts[number], whole[common:], len(ids) - len(prompt), bool(ended[row]))
