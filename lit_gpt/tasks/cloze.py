"""Make a cloze task for lm-eval from held-out text: which of four sentences comes next?

The true choice is the document's next sentence; the others are sentences of other documents, of about the same length,
so that neither length nor style gives the answer away. Nothing is downloaded; the same text, seed and number give the
same items. Chance is 25 %. Costs: the texts of at most `max_documents` documents in memory.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import ShardFile, TokenStore, document_ends
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.files import publish
from lit_gpt.prepare.document_source import read_documents
from lit_gpt.prepare.records import Fields
from lit_gpt.prepare.reject_guard import RejectGuard
from lit_gpt.prepare.source_files import open_sources

CHOICES = 4
_CONTEXT_SENTENCES = 3
_SENTENCE_CHARACTERS = range(30, 301)
"""Length of a choice: shorter sentences say too little, longer ones are often lists."""
_DISTRACTORS_DRAWN = 12
"""Number of sentences drawn, of which those nearest in length are taken."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÄÖÜ»„\"])")


class Item(NamedTuple):
    """One question."""

    context: str
    choices: list[str]
    answer: int
    """Index of the true choice."""


def texts_of_files(sources: Sequence[str], fields: Fields, guard: RejectGuard) -> Iterator[str]:
    """The texts in files, as prepare_data.py reads them. Raises BadInput as open_sources and `guard` do."""
    files = open_sources(sources, fields, allow_damaged_files=guard.allow_damaged_files)
    return (document.text for document in read_documents(files, fields, guard))


def texts_of_store(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of a store's documents, decoded; BadInput if the store was made with another tokenizer."""
    if store.tokenizer_fingerprint != tokenizer.fingerprint:
        raise BadInput(f"{store.path} was made with another tokenizer than the one named")
    control = {tokenizer.bos_id, tokenizer.eos_id}
    for shard in store.shards:
        ends = [0, *document_ends(store, shard).tolist()]
        with ShardFile(store.path, shard, store) as file:
            for start, end in itertools.pairwise(ends):
                yield tokenizer.decode([id for id in file.read(start, end).tolist() if id not in control])


def make_items(texts: Iterable[str], count: int, seed: int, *, max_documents: int) -> list[Item]:
    """At most `count` items from the first `max_documents` texts; BadInput if there is too little text for one."""
    documents = [_sentences(text) for text in itertools.islice(texts, max_documents)]
    places = [
        (number, place)
        for number, sentences in enumerate(documents)
        for place in range(1, len(sentences))
        if len(sentences[place]) in _SENTENCE_CHARACTERS
    ]
    if len({number for number, _ in places}) < CHOICES:
        raise BadInput(
            f"{len(documents)} documents, too little text for a cloze task: {CHOICES} or more must have two sentences, "
            f"of {_SENTENCE_CHARACTERS[0]} to {_SENTENCE_CHARACTERS[-1]} characters"
        )
    rng = random.Random(seed)
    items = []
    for number, place in rng.sample(places, min(count, len(places))):
        truth = documents[number][place]
        others = _distractors(rng, documents, places, number, truth)
        if len(others) < CHOICES - 1:
            continue
        answer = rng.randrange(CHOICES)
        context = " ".join(documents[number][max(0, place - _CONTEXT_SENTENCES) : place])
        items.append(Item(context, [*others[:answer], truth, *others[answer:]], answer))
    if not items:
        raise BadInput("the documents repeat each other's sentences: no cloze item can be made of them")
    return items


def _sentences(text: str) -> list[str]:
    return [sentence for line in text.split("\n") for sentence in _SENTENCE_END.split(line.strip()) if sentence]


def _distractors(
    rng: random.Random,
    documents: Sequence[Sequence[str]],
    places: Sequence[tuple[int, int]],
    number: int,
    truth: str,
) -> list[str]:
    """Sentences that are not in document `number`, nearest to `truth` in length; shuffled."""
    drawn = rng.sample(places, min(_DISTRACTORS_DRAWN, len(places)))
    own = set(documents[number])
    found = dict.fromkeys(documents[other][place] for other, place in drawn if other != number)
    near = sorted((text for text in found if text not in own), key=lambda text: abs(len(text) - len(truth)))
    nearest = near[: CHOICES - 1]
    rng.shuffle(nearest)
    return nearest


def write_task(folder: Path, name: str, items: Sequence[Item], source: str) -> None:
    """Write name.yaml and name.jsonl in `folder`: a task for lm-eval's --include_path and for scripts/evaluate.py."""
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{name}.jsonl").absolute()
    publish(data, [(json.dumps(item._asdict(), ensure_ascii=False) + "\n").encode() for item in items])
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": metrics,
        "metadata": {"version": 1.0, "source": source},
    }
    publish(folder / f"{name}.yaml", [yaml.safe_dump(task, sort_keys=False, allow_unicode=True).encode()])
