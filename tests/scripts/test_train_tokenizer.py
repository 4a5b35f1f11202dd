"""The tokenizer that the project trains: byte-level, deterministic, and the same in transformers."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lit_gpt.data.tokenizer
from lit_gpt.data.tokenizer import Tokenizer
from tests.support.programs import ROOT, run_program

WORDS = [
    "Der",
    "Bär",
    "läuft",
    "über",
    "die",
    "Straße",
    "und",
    "grüßt",
    "1234",
    "Füchse.",
    "„Größe“",
    "–",
    "E-Mail,",
    "https://x.example\n\nAbsatz\tTab",
]
TRICKY = [
    "", " ", "\n", "a\n\n\nb", " \n \n", "\r\n", "</s> und <s>", "<|endoftext|>", "🐑🏳️‍🌈 漢字",
    "e\u0301 u\u0308", "\x00\u200b", "12345,6",
    "Donaudampfschifffahrt", "   drei", "ende   ", "Ġ▁Ċ", "\ufeffBOM", "\U0010ffff",
]  # fmt: skip


def run(*argv: object, code: int = 0) -> str:
    done = run_program([sys.executable, ROOT / "scripts/train_tokenizer.py", *argv])
    assert done.returncode == code, done.stderr
    return done.stderr


def corpus(folder: Path) -> Path:
    """120 made-up documents of 60 words."""
    lines = [
        json.dumps({"id": str(n), "text": " ".join(WORDS[(n * k + k // 3) % len(WORDS)] for k in range(60))})
        for n in range(120)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "corpus.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tokenizer")
    run("--source", corpus(base), "--destination_path", base / "out", "--vocab_size", 320)
    return base / "out"


@pytest.mark.parametrize("examples", [300, pytest.param(100_000, marks=pytest.mark.long)])
def test_any_text_comes_back(folder: Path, examples: int) -> None:
    tokenizer = Tokenizer.from_folder(folder)

    @settings(max_examples=examples, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def comes_back(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)

    comes_back()
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("examples", [200, pytest.param(100_000, marks=pytest.mark.long)])
def test_parts_are_exact(folder: Path, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    tokenizer = Tokenizer.from_folder(folder)

    @settings(max_examples=examples, deadline=None)
    @given(st.text(st.sampled_from("ab \n\r\tüß1.")), st.integers(1, 9))
    def same_ids(text: str, size: int) -> None:
        monkeypatch.setattr(lit_gpt.data.tokenizer, "PART_CHARACTERS", 1 << 30)
        whole = tokenizer.encode(text)
        monkeypatch.setattr(lit_gpt.data.tokenizer, "PART_CHARACTERS", size)
        assert tokenizer.encode(text) == whole

    same_ids()
    monkeypatch.setattr(lit_gpt.data.tokenizer, "PART_CHARACTERS", 4)
    assert tokenizer._parts("aaa\nbbb\nccc") == ["aaa\n", "bbb\n", "ccc"]


def test_vocabulary_holds_all_bytes_and_the_two_control_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (320, 0, 1)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sum(len(token) == 1 for token in vocabulary) == 256


def test_pre_tokenization_is_german_friendly(folder: Path) -> None:
    """A word keeps its umlauts, its combining marks and the space before it; a digit stands alone."""
    tokenizer = Tokenizer.from_folder(folder)
    split = tokenizer._backend.pre_tokenizer.pre_tokenize_str("Die größte Mu\u0308he: 2024\n\nE-Mail  x")
    text = "Die größte Mu\u0308he: 2024\n\nE-Mail  x"
    assert [text[slice(*span)] for _, span in split] == [
        "Die", " größte", " Mu\u0308he", ":", " ", "2", "0", "2", "4", "\n\n", "E", "-", "Mail", " ", " x",
    ]  # fmt: skip


def test_transformers_gives_the_same_ids(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_folder(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*TRICKY, " ".join(WORDS)]
    assert [theirs.encode(text, add_special_tokens=False) for text in texts] == tokenizer.encode_batch(texts)
    assert [theirs.encode(text) for text in texts] == tokenizer.encode_batch(texts)
    assert [theirs.decode(theirs.encode(text)) for text in texts] == texts
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, 320)


def test_transformers_gives_the_same_ids_beside_a_llama_model(folder: Path, tmp_path: Path) -> None:
    """In an exported model's folder AutoTokenizer sees model_type llama and must not reach for LLaMA's tokenizer."""
    transformers = pytest.importorskip("transformers")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(text) for text in TRICKY] == Tokenizer.from_folder(folder).encode_batch(TRICKY)


@pytest.mark.slow
def test_words_are_bounded(folder: Path, tmp_path: Path) -> None:
    """A run of one character would take time by the square of its length, and become one token."""
    lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(["a" * 3_000_000, "b" * 512])]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    run("--source", tmp_path / "long.jsonl", "--destination_path", tmp_path / "out", "--vocab_size", 290)
    vocabulary = json.loads((tmp_path / "out/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert max(map(len, vocabulary)) <= 512
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert tokenizer.encode("a" * 1024) == [vocabulary["a" * 256]] * 4
    before, after = (json.loads((path / "tokenizer.json").read_text()) for path in (folder, tmp_path / "out"))
    assert before["pre_tokenizer"] == after["pre_tokenizer"]


def test_same_input_same_bytes(folder: Path, tmp_path: Path) -> None:
    run("--source", corpus(tmp_path), "--destination_path", tmp_path / "out", "--vocab_size", 320)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_reads_what_prepare_data_reads(shared: Path, tmp_path: Path) -> None:
    source = shared / "data/debian-handbook-de.jsonl.gz"
    said = run("--source", source, "--destination_path", tmp_path / "out", "--vocab_size", 2000)
    assert "trained on 524 documents" in said
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    text = json.loads(gzip.decompress(source.read_bytes()).split(b"\n")[0])["text"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 2 < len(text.encode()) / len(tokenizer.encode(text)) < 5  # bytes a token


def test_small_corpus_gives_a_smaller_vocabulary_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ja ja"}')
    said = run("--source", tmp_path, "--destination_path", tmp_path / "out", "--vocab_size", 1000)
    assert "not the 1000 asked for" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "absent", "--destination_path", "out"], "absent: there is no such file"),
        (["--source", ".", "--destination_path", "out"], "no file to read in folder"),
        (["--source", "a.doc", "--destination_path", "out"], "a.doc is of no known kind"),
        (["--source", "empty.jsonl", "--destination_path", "out"], "the source is empty"),
        (["--source", "a.jsonl", "--destination_path", "out", "--vocab_size", "257"], "must be at least 258"),
        (["--source", "a.jsonl", "--destination_path", "a.doc/out"], "cannot write"),
        (["--source", "a.jsonl", "--destination_path", "old"], "already holds a tokenizer"),
        (["--source", "a.jsonl"], "--destination_path"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    for name in ("old", "folder"):
        (tmp_path / name).mkdir()
    for name, text in (("a.doc", ""), ("empty.jsonl", ""), ("a.jsonl", '{"text": "ja"}'), ("old/tokenizer.json", "{}")):
        (tmp_path / name).write_text(text)
    if arguments[1] == ".":
        arguments = ["--source", "folder", *arguments[2:]]
    paths = {"absent", "folder", "a.doc", "empty.jsonl", "a.jsonl", "out", "a.doc/out", "old"}
    said = run(*(tmp_path / word if word in paths else word for word in arguments), code=2)
    assert message in said
    assert len(said.splitlines()) == 1
