"""The stage minhash: of documents that are nearly equal one stays. datatrove's MinHash, with a record of which stays.

datatrove's defaults (14 buckets of 8 hashes of 5-grams) find pairs of a Jaccard similarity of 0.8 with a probability of
0.92. Words are cut at white space after marks are left out; case does not count, umlauts and digits do.
Invariant: signatures and clusters depend on the documents' order, not on workers. Each task writes in a folder of its
own first, so one that outlives a killed build harms nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.io import get_datafolder
from datatrove.pipeline.dedup import minhash as engine
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer, simple_span_tokenize

from lit_gpt.corpus.fates import CUT, FATE, Rule, write_fates, write_rules
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.settings import DedupSettings
from lit_gpt.corpus.survivors import Survivors
from lit_gpt.files import discard, fsync, rename
from lit_gpt.locks import temporary_path

STAGE = "minhash"
engine.tqdm = partial(engine.tqdm, disable=True)  # it would draw a bar between the lines of the log
_PAIR = np.dtype([("document", "<u4"), ("cluster", "<u4")])


def config_of(settings: DedupSettings) -> MinhashConfig:
    return MinhashConfig(
        n_grams=settings.minhash_ngrams,
        num_buckets=settings.minhash_buckets,
        hashes_per_bucket=settings.minhash_hashes,
        norm_config=TextNormConfig(norm_unicode_diacritics=False, norm_numbers=False),
    )


class SpaceTokenizer(WordTokenizer):
    """Words are what lies between white space; datatrove's own such tokenizer asks for spaCy too."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return list(simple_span_tokenize(text, self.sent_tokenize(text)))


def shingle_hash(shingle: str) -> int:
    """datatrove's hash; its own function gives xxhash a str, which releases from 4 on refuse."""
    return xxhash.xxh64_intdigest(shingle.encode())


class SignatureStep(MinhashDedupSignature):
    """Signatures of the documents that come, in a file a bucket; the part is the file's name."""

    name = "sign documents"

    def __init__(self, layout: Layout, settings: DedupSettings) -> None:
        super().__init__(str(layout.work), config_of(settings), SpaceTokenizer())
        self._layout, self._hash_func = layout, shingle_hash

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        with _Apart(self._layout.work / "minhash/signatures", f"{rank:05d}") as folder:
            self.output_folder = get_datafolder(str(folder))
            super().run(data, rank, world_size)
        yield from ()


class BucketStep(MinhashDedupBuckets):
    """Pairs of near-duplicates of a bucket."""

    name = "match documents"

    def __init__(self, layout: Layout, settings: DedupSettings) -> None:
        super().__init__(str(layout.work / "minhash/signatures"), str(layout.work), config=config_of(settings))
        self._layout = layout

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        with _Apart(self._layout.work / "minhash/pairs", f"{rank:05d}") as folder:
            self.output_folder = get_datafolder(str(folder))
            super().run(data, rank, world_size)
        yield from ()


class ClusterStep(MinhashDedupCluster):
    """One task for all parts: writes the fates of a pass."""

    name = "settle near-duplicates"

    def __init__(self, layout: Layout, number: int, parts: int, settings: DedupSettings) -> None:
        folder = layout.work / "minhash"
        super().__init__(str(folder / "pairs"), str(folder), config=config_of(settings), save_cluster_id=True)
        self._layout, self._number, self._parts = layout, number, parts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        clusters = self._layout.work / "minhash/clusters"
        discard(clusters)
        with _Apart(self._layout.work / "minhash", "clusters", whole=True) as folder:
            self.output_folder = get_datafolder(str(folder))
            super().run(data, rank, world_size)
        threshold = round((1 / self.config.num_buckets) ** (1 / self.config.hashes_per_bucket), 3)
        write_rules(self._layout, self._number, [Rule(STAGE, "near_duplicate", threshold)])
        kept = dict(self._kept(clusters))
        for part in range(self._parts):
            fates = np.zeros(len(Survivors.read(self._layout, self._number, part).places), FATE)
            fates["of_part"] = -1
            for document, cluster in _pairs(clusters, part):
                of_part, of_document = kept[cluster]
                if (part, document) != (of_part, of_document):
                    fates[document] = (1, np.nan, of_part, of_document)
            write_fates(self._layout, self._number, part, fates, np.zeros(0, CUT))
        yield from ()

    def _kept(self, clusters: Path) -> Iterator[tuple[int, tuple[int, int]]]:
        """Each cluster's document that stays: the one that datatrove does not remove."""
        for part in range(self._parts):
            path = clusters / f"{part:06d}.remove"
            removed = set(np.fromfile(path, "<u4").tolist()) if path.exists() else set()
            for document, cluster in _pairs(clusters, part):
                if document not in removed:
                    yield cluster, (part, document)


def _pairs(clusters: Path, part: int) -> list[tuple[int, int]]:
    path = clusters / f"{part:06d}.clusters"
    return np.fromfile(path, _PAIR).tolist() if path.exists() else []


class _Apart:
    """A folder of this process's own; at the end its files move to `target`, or with `whole` it becomes target/name."""

    def __init__(self, target: Path, name: str, *, whole: bool = False) -> None:
        self._target, self._name, self._whole = target, name, whole
        self._folder = temporary_path(target.parent / f"{target.name}-{name}")

    def __enter__(self) -> Path:
        discard(self._folder)
        self._folder.mkdir(parents=True)
        return self._folder

    def __exit__(self, kind: Any, *exception: object) -> None:
        if kind is None:
            fsync(self._folder)
            if self._whole:
                rename(self._folder, self._target / self._name)
                return
            for path in sorted(self._folder.rglob("*")):
                if path.is_file():
                    final = self._target / path.relative_to(self._folder)
                    final.parent.mkdir(parents=True, exist_ok=True)
                    rename(path, final)
        discard(self._folder)
