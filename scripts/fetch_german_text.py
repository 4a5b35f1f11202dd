"""Fetch some real German text for the demo: for each document a JSON line with "id", "text" and "source".

The first of three sources that works is taken; the program says why those before it were not:
  handbook   Debian's handbook, a package of about 35 MB that `apt-get download` fetches without installing anything;
             one document a section (about 500), licensed GPL-2+ or CC-BY-SA-3.0
  hub        the first records of the data set that the LLäMmlein models were trained on, streamed, a few MB
  generated  sentences of a small German grammar, the same each time; no network; "source" says that it is no real text
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program
from lit_gpt.files import publish, sweep

PACKAGE = "debian-handbook"
HUB_DATASET = "LSX-UniWue/LLaMmlein-Dataset"
APT_TIMEOUT_S = 180
HUB_TIMEOUT_S = 10
GENERATED_SEED = 3407


class Document(NamedTuple):
    id: str
    text: str
    source: str


class SourceUnavailable(Exception):
    """This source does not work on this machine; the message says why."""


# Debian's handbook

ENGLISH_WORDS = frozenset({"the", "of", "and", "to", "is", "that", "for", "with", "this", "are"})
LINK = "→"  # a line that is nothing but the address of a source
GERMAN_WORDS = frozenset({"der", "die", "das", "und", "zu", "ist", "den", "von", "mit", "ein", "für"})


class SectionParser(HTMLParser):
    """The sections of one page. A heading opens a section; each block in it (paragraph, item, cell) is one line.

    Navigation and listings of commands are left out, which are not prose.
    """

    HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
    BLOCKS = HEADINGS | {"div", "p", "li", "dt", "dd", "pre", "td", "th", "tr", "ul", "ol", "dl", "table"}
    SKIPPED_CLASSES = frozenset({"docnav", "toc"})
    SKIPPED_IDS = frozenset({"banner", "title"})
    SKIPPED_TAGS = frozenset({"head", "pre"})
    VOID_TAGS = frozenset({"br", "hr", "img", "link", "meta"})  # they open and never close

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[list[str]] = []
        self._block: list[str] = []
        self._skipped: list[str] = []  # open tags, from the outermost skipped one inwards

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.VOID_TAGS:
            return self.handle_data(" ")
        if tag in self.BLOCKS:
            self._end_block()
        if self._skipped or self._is_skipped(tag, dict(attrs)):
            self._skipped.append(tag)
        elif tag in self.HEADINGS:
            self.sections.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """`<a id="x" />` opens nothing, so nothing has to close."""

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._skipped.pop()
        elif tag in self.BLOCKS:
            self._end_block()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._block.append(data)

    def _is_skipped(self, tag: str, attrs: dict[str, str | None]) -> bool:
        classes = set((attrs.get("class") or "").split())
        return tag in self.SKIPPED_TAGS or bool(classes & self.SKIPPED_CLASSES) or attrs.get("id") in self.SKIPPED_IDS

    def _end_block(self) -> None:
        text = " ".join("".join(self._block).split())
        self._block = []
        if text and self.sections:
            self.sections[-1].append(text)


def is_english(text: str) -> bool:
    """Whether English function words outnumber German ones: a quarter of the German edition is not translated yet."""
    words = re.findall(r"[a-zäöüß]+", text.lower())
    return sum(word in ENGLISH_WORDS for word in words) > sum(word in GERMAN_WORDS for word in words)


def handbook_documents(pages: Path, source: str) -> Iterator[Document]:
    """One document a section that has German text below its heading, in the order of the pages' names."""
    for page in sorted(pages.glob("*.html")):
        parser = SectionParser()
        parser.feed(page.read_text(encoding="utf-8"))
        parser.close()
        for number, (heading, *body) in enumerate(filter(None, parser.sections)):
            if german := [block for block in body if not is_english(block) and not block.startswith(LINK)]:
                yield Document(f"debian-handbook-de/{page.name}#{number}", "\n".join([heading, *german]), source)


def from_handbook(limit: int) -> Iterator[Document]:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise SourceUnavailable("apt-get and dpkg-deb are not on this machine")
    with tempfile.TemporaryDirectory() as folder:
        if not run(["apt-cache", "show", PACKAGE], folder).ok:
            if os.geteuid() != 0:
                raise SourceUnavailable(f"apt does not know {PACKAGE}; `sudo apt-get update` may help")
            run(["apt-get", "update", "--quiet"], folder)  # if it fails, the download fails too, with a better message
        log.info("downloading %s", PACKAGE)
        download = run(["apt-get", "download", "--quiet", "-o", "Acquire::http::Timeout=20", PACKAGE], folder)
        archives = sorted(Path(folder).glob("*.deb"))
        if not download.ok or not archives:
            raise SourceUnavailable(f"apt-get download {PACKAGE}: {download.complaint}")
        unpacked = run(["dpkg-deb", "-x", str(archives[0]), "unpacked"], folder)
        pages = Path(folder, "unpacked/usr/share/doc/debian-handbook/html/de-DE")
        if not unpacked.ok or not pages.is_dir():
            raise SourceUnavailable(f"{archives[0].name} holds no German pages")
        yield from itertools.islice(handbook_documents(pages, archives[0].stem), limit)


class Outcome(NamedTuple):
    ok: bool
    complaint: str
    """The last error line that apt or dpkg wrote."""


def run(command: list[str], folder: str) -> Outcome:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=APT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(False, f"no end within {APT_TIMEOUT_S} s")
    errors = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
    return Outcome(done.returncode == 0, errors[-1] if errors else "")


# The published data set


def from_hub(limit: int) -> Iterator[Document]:
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(HUB_TIMEOUT_S))  # read when huggingface_hub is imported
    from huggingface_hub import HfApi, HfFileSystem

    try:
        HfApi().dataset_info(HUB_DATASET, timeout=HUB_TIMEOUT_S)  # fails at once; the file system below would retry
        yield from first_records(HfFileSystem(), f"datasets/{HUB_DATASET}", limit)
    except Exception as error:  # releases of huggingface_hub raise different classes
        raise SourceUnavailable(f"{HUB_DATASET}: {type(error).__name__}: {error}") from error


def first_records(file_system: Any, folder: str, limit: int) -> Iterator[Document]:
    """The first records with text of the first data file below `folder`; the rest of the file is not read."""
    paths = sorted(path for path in file_system.find(folder) if re.search(r"\.(parquet|jsonl(\.gz|\.zst)?)$", path))
    if not paths:
        raise SourceUnavailable(f"{folder} holds no .parquet or .jsonl file")
    read = parquet_records if paths[0].endswith(".parquet") else json_records
    with file_system.open(paths[0], "rb") as file:
        records = (record for record in read(file, paths[0]) if record.get("text"))
        for number, record in enumerate(itertools.islice(records, limit)):
            yield Document(str(record.get("id") or f"{Path(paths[0]).name}#{number}"), record["text"], HUB_DATASET)


def parquet_records(file: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def json_records(file: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
    import pyarrow

    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
    lines = io.BufferedReader(pyarrow.CompressedInputStream(file, codec)) if codec else file
    yield from map(json.loads, lines)


# A small grammar

ARTICLES = {"m": ("der", "den", "dem"), "f": ("die", "die", "der"), "n": ("das", "das", "dem")}
NOUNS = (
    "Bauer m, Bäckerin f, Kind n, Lehrer m, Nachbarin f, Mädchen n, Müller m, Ärztin f, Schaf n, Hund m, Katze f, "
    "Pferd n, Garten m, Wiese f, Haus n, Weg m, Brücke f, Dorf n, Fluss m, Mühle f, Feld n, Wald m, Stadt f, Tal n, "
    "Brief m, Zeitung f, Buch n, Korb m, Laterne f, Brot n, Mantel m, Glocke f, Fenster n, Turm m, Straße f, Tor n"
)
ADJECTIVES = "alt jung klein groß neu schön still hell grün lang breit schmal freundlich fleißig ruhig"
VERBS = "sieht findet sucht kennt beschreibt zeichnet bewacht erreicht verlässt braucht liebt hört malt pflegt"
ADVERBS = "heute morgens abends oft manchmal plötzlich endlich dort danach zuerst gestern bald"
PLACES = "in neben vor hinter bei unter"
CONJUNCTIONS = "weil obwohl während nachdem sobald"


class Grammar:
    """German sentences about one topic: a few nouns, adjectives and verbs that recur in a document."""

    def __init__(self, choice: random.Random) -> None:
        self.choice = choice
        self.nouns = choice.sample([tuple(noun.split()) for noun in NOUNS.split(", ")], 7)
        self.adjectives = choice.sample(ADJECTIVES.split(), 5)
        self.verbs = choice.sample(VERBS.split(), 5)

    def noun_phrase(self, case: int) -> str:
        """A definite noun phrase in the nominative (0), accusative (1) or dative (2), at times with an adjective."""
        noun, gender = self.choice.choice(self.nouns)
        article = ARTICLES[gender][case]
        if self.choice.random() < 0.5:
            return f"{article} {noun}"
        ending = "en" if case == 2 or article == "den" else "e"
        return f"{article} {self.choice.choice(self.adjectives)}{ending} {noun}"

    def sentence(self) -> str:
        subject, object_, verb = self.noun_phrase(0), self.noun_phrase(1), self.choice.choice(self.verbs)
        place = f" {self.choice.choice(PLACES.split())} {self.noun_phrase(2)}" if self.choice.random() < 0.4 else ""
        if self.choice.random() < 0.3:  # the verb stays second: after an adverb the subject follows it
            clause = f"{self.choice.choice(ADVERBS.split())} {verb} {subject} {object_}{place}"
        else:
            clause = f"{subject} {verb} {object_}{place}"
        if self.choice.random() < 0.3:  # in a subordinate clause the verb goes last
            reason = f"{self.noun_phrase(0)} {self.noun_phrase(1)} {self.choice.choice(self.verbs)}"
            clause += f", {self.choice.choice(CONJUNCTIONS.split())} {reason}"
        return clause[0].upper() + clause[1:] + "."

    def paragraph(self) -> str:
        return " ".join(self.sentence() for _ in range(self.choice.randint(3, 9)))


def from_grammar(limit: int, seed: int = GENERATED_SEED) -> Iterator[Document]:
    choice = random.Random(seed)
    for number in range(min(limit, 800)):
        grammar = Grammar(choice)
        text = "\n".join(grammar.paragraph() for _ in range(choice.randint(2, 5)))
        yield Document(f"generated-{seed}#{number}", text, f"generated by a small grammar, seed {seed}")


log = logging.getLogger(__name__)

SOURCES: dict[str, Callable[[int], Iterable[Document]]] = {
    "handbook": from_handbook,
    "hub": from_hub,
    "generated": from_grammar,
}


def fetch(names: Iterable[str], limit: int) -> tuple[list[Document], str]:
    """The documents of the first source that works, and a message: which it was, and why those before it were not."""
    refusals = []
    for name in names:
        try:
            documents = list(SOURCES[name](limit))
        except SourceUnavailable as error:
            refusals.append(f"{name} not taken: {error}")
            continue
        if not documents:
            refusals.append(f"{name} not taken: it gave no document")
            continue
        words = sum(len(document.text.split()) for document in documents)
        found = f"{name} taken: {len(documents):,} documents, {words:,} words, {documents[0].source}"
        return documents, "; ".join([found, *refusals])
    raise BadInput("; ".join(refusals))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--destination_path", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--source", choices=["auto", *SOURCES], default="auto", help="auto: the first that works")
    parser.add_argument("--max_documents", type=int, default=2000, help="documents at most")
    args = parser.parse_args()
    require_at_least(args, 1, "max_documents")
    documents, message = fetch(SOURCES if args.source == "auto" else [args.source], args.max_documents)
    try:
        args.destination_path.parent.mkdir(parents=True, exist_ok=True)
        sweep(args.destination_path.parent, args.destination_path.name)
        lines = ((json.dumps(document._asdict(), ensure_ascii=False) + "\n").encode() for document in documents)
        publish(args.destination_path, lines)
    except OSError as error:
        raise BadInput(f"cannot write {args.destination_path}: {error.strerror}") from None
    print(message)


if __name__ == "__main__":
    run_program(main)
