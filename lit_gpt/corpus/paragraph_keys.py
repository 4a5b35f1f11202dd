"""Paragraph deduplication, first pass: a key for each paragraph of a part, sorted.

The key is the xxh3 (128 bits) of the normalised paragraph: Unicode NFC, runs of white space to one space, none at the
ends, case as the recipe says. Blank paragraphs have none.
Costs: 24 bytes a paragraph, in memory for one part, on disk for all.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from datatrove.pipeline.base import PipelineStep

from lit_gpt.corpus.draft import BATCH_CHARACTERS, Draft
from lit_gpt.corpus.fates import SPOT_BITS
from lit_gpt.corpus.line_words import count_lines
from lit_gpt.corpus.parts import Layout
from lit_gpt.files import publishing

BLANK = 0xFFFFFFFF
"""Stands for the number of words of a blank paragraph."""


class SignStep(PipelineStep):
    """Writes, for a part: .keys.npy (3, n): key high, key low, spot (fates.py), sorted; .words.npy: words of each
    paragraph; .starts.npy: number of the first paragraph of each document, and of all."""

    name = "sign paragraphs"
    type = "dedup"

    def __init__(self, layout: Layout, fold_case: bool) -> None:
        super().__init__()
        self._layout, self._fold = layout, fold_case

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        signatures = Signatures(self._fold)
        for draft in data:
            signatures.add(draft)
            yield draft
        keys, words, starts = signatures.arrays()
        for kind, array in (("keys.npy", keys), ("words.npy", words), ("starts.npy", starts)):
            with publishing(self._layout.of_dedup(kind, rank)) as partial, open(partial, "wb") as file:
                np.save(file, array)


class Signatures:
    """The keys of the paragraphs of documents that are added one after the other."""

    def __init__(self, fold_case: bool = False) -> None:
        self._fold = fold_case
        self._digests = bytearray()
        self._spots: list[npt.NDArray[np.uint64]] = []
        self._words: list[npt.NDArray[np.uint32]] = []
        self._starts = [0]
        self._paragraphs = [0]
        self._texts: list[str] = []
        self._size = 0

    def add(self, draft: Draft) -> None:
        self._texts.append(draft.text)
        self._size += len(draft.text)
        if self._size >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        text = "\n".join(self._texts)
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        if self._fold:
            text = text.casefold()
        counts = np.array([text_.count("\n") + 1 for text_ in self._texts])
        encoded = text.encode()
        lines = count_lines(encoded)
        digest = xxhash.xxh3_128_digest
        raw = encoded.split(b"\n")
        for number in np.flatnonzero(~(lines.tidy | lines.blank)).tolist():
            raw[number] = " ".join(raw[number].decode().split()).encode()
        signed = np.flatnonzero(~lines.blank)
        self._digests += b"".join([digest(raw[number]) for number in signed.tolist()])
        documents = np.repeat(np.arange(len(counts)), counts)
        inside = np.arange(len(raw)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = len(self._starts) - 1
        spots = (documents + first).astype(np.uint64) << np.uint64(SPOT_BITS) | inside.astype(np.uint64)
        self._spots.append(spots[signed])
        self._words.append(np.where(lines.blank, BLANK, lines.words).astype(np.uint32))
        self._starts += (self._starts[-1] + np.cumsum(counts)).tolist()
        self._texts, self._size = [], 0

    def arrays(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Keys, words and starts, as SignStep writes them."""
        self._flush()
        words = np.concatenate([np.zeros(0, np.uint32), *self._words])
        spots = np.concatenate([np.zeros(0, np.uint64), *self._spots])
        digests = np.frombuffer(bytes(self._digests), ">u8").reshape(-1, 2)
        order = sorted_order(digests[:, 0].astype(np.uint64), digests[:, 1].astype(np.uint64))
        keys = np.stack([digests[order, 0].astype(np.uint64), digests[order, 1].astype(np.uint64), spots[order]])
        return keys, words, np.array(self._starts, np.int64)


def sorted_order(high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The order by (high, low, position)."""
    order = np.argsort(high, kind="stable")
    ranked, second = high[order], low[order]
    same = ranked[1:] == ranked[:-1]
    if np.any(same & (second[1:] != second[:-1])):  # 64 equal bits of 128: never seen, but it costs nothing to be exact
        order = np.lexsort((low, high))
    return order
