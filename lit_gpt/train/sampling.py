"""Samples: texts that the model writes during the training.

Every rank runs the same forward passes, because sharded weights are gathered by all; rank 0 draws the tokens and
broadcasts them. The prompts fill the rows of full micro-batches, so that compiled blocks see only shapes that they
know. The training is not changed: no gradients, no state, and a random generator that depends on seed and step alone.
Costs: `sample_tokens` forward passes of a micro-batch (no KV cache) for each micro-batch of prompts.
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
    """Prompts and their tokens."""

    tokenizer: Tokenizer
    texts: list[str]
    ids: list[list[int]]
    """Tokens of each text, with a BOS if the training data has it."""


class Sample(NamedTuple):
    """One prompt's continuation."""

    prompt: str
    text: str
    """The continuation alone."""
    tokens: int
    """Tokens of the continuation."""
    ended: bool
    """The model ended the document (EOS)."""


def open_prompts(
    settings: SamplingSettings, tokenizer_path: str | None, block_size: int, *, add_bos: bool
) -> Prompts | None:
    """The encoded prompts; None without samples. Raises BadInput for a prompt that is empty or does not fit."""
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
    before_token: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """A continuation of each prompt. A collective: every rank calls it and gets the same.

    before_token may raise, on every rank.
    next_logits(tokens (B, T) int64, cu_seqlens, at (B,)) gives the logits (B, V) of the token after position `at`.
    """
    generator = torch.Generator().manual_seed(((seed << 32) + step) % (1 << 64))
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
            before_token()
            logits = next_logits(tokens.to(device), cu_seqlens, (lengths - 1).to(device))
            drawn = _draw(logits[:, :vocab_size].float().cpu(), settings.sample_temperature, generator)
            if dist.is_initialized():
                dist.broadcast(drawn, src=0)
            running = ~ended
            ended |= drawn == prompts.tokenizer.eos_id
            written = running & ~ended
            tokens[written, lengths[written]] = drawn[written]
            lengths += written
            if ended.all():
                break
        samples += _decoded(prompts, start, tokens, lengths, ended)
    return samples


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(B,) tokens: the likeliest, or drawn at `temperature`."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


def _decoded(prompts: Prompts, start: int, tokens: Tensor, lengths: Tensor, ended: Tensor) -> Iterator[Sample]:
    """Decode each text together with its prompt: a character may have tokens in both."""
    for row, number in enumerate(range(start, min(start + len(tokens), len(prompts.ids)))):
        prompt, ids = prompts.ids[number], tokens[row, : lengths[row]].tolist()
        before, whole = prompts.tokenizer.decode(prompt), prompts.tokenizer.decode(ids)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        yield Sample(prompts.texts[number], whole[common:], len(ids) - len(prompt), bool(ended[row]))
