"""Small token stores for tests, and a reader for them that is independent of the tested code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lit_gpt.data.token_store import HEADER_BYTES, TokenStore, write_store

EOS = 2
VOCABULARY = 1000


def make_store(path: Path, documents: int, seed: int = 0, shard_tokens: int = 500, longest: int = 90) -> TokenStore:
    """Documents of 1 to `longest` tokens, the last of each EOS."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest, documents)
    ids = [[*random.integers(3, VOCABULARY, length).tolist(), EOS] for length in lengths]
    return write_store(
        path,
        [(f"doc-{number}", tokens) for number, tokens in enumerate(ids)],
        tokenizer_fingerprint="test",
        vocab_size=VOCABULARY,
        bos_id=None,
        eos_id=EOS,
        shard_tokens=shard_tokens,
    )


def shard_tokens(store: TokenStore, number: int) -> list[int]:
    """The tokens of a shard, read without the code under test."""
    shard = store.shards[number]
    raw = (store.path / f"{shard.name}.tokens").read_bytes()
    return np.frombuffer(raw[HEADER_BYTES : HEADER_BYTES + 2 * shard.tokens], "<u2").tolist()
