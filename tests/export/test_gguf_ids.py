"""No GGUF file without the training's ids: other kinds of tokenizers are converted rightly, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export import llama_cpp
from lit_gpt.export.gguf_vocabulary import SPLITS
from lit_gpt.export.parity import GERMAN_TEXT
from tests.export.test_gguf import convert, value, write_model
from tests.support.small_tokenizer import write_byte_level

gguf = pytest.importorskip("gguf")

CONTROL = ("<s>", "</s>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [GERMAN_TEXT, " führender  Abstand", "Grimm'sche Ku'damm\n\n\t'Der' 🐑 漢字", "▁ <0x41> </s>"]


def like_llama_2(*, unknown: str | None) -> dict[str, Any]:
    """A tokenizer.json as transformers once wrote it for LLaMA 2: the normalizer adds the prefix and turns spaces."""
    first = ([unknown] if unknown else []) + [*CONTROL, *BYTES]
    backend = tokenizers.Tokenizer(models.BPE(unk_token=unknown, byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first, show_progress=False)
    backend.train_from_iterator([GERMAN_TEXT], trainer)
    rules = json.loads(backend.to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    text = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    rules["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    rules["pre_tokenizer"] = None
    rules["decoder"] = {"type": "Sequence", "decoders": [text, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] not in BYTES]
    return rules


def over_characters(merges: list[list[str]]) -> dict[str, Any]:
    """A BPE over the characters a, b and c, with the tokens that the merges make."""
    tokens = ["<unk>", *CONTROL, *"abce▁", *("".join(merge) for merge in merges)]
    backend = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    rules = json.loads(backend.to_str())
    rules["model"]["merges"] = merges
    return rules


def other_model(model: object, trainer: object) -> dict[str, Any]:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([GERMAN_TEXT], trainer)
    return json.loads(backend.to_str())


def model_with(rules: dict[str, Any], folder: Path) -> Path:
    """A small exported model in folder/model whose tokenizer has these rules."""
    source = folder / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text(json.dumps(rules))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return write_model(folder / "model", source)


@pytest.mark.slow
@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_classic_llama_2_tokenizer(tmp_path: Path, unknown: str | None) -> None:
    rules = like_llama_2(unknown=unknown)
    path = convert(model_with(rules, tmp_path), tmp_path / "m.gguf", "f16")
    reader = gguf.GGUFReader(path)
    assert value(reader, "tokenizer.ggml.model") == "llama"
    assert value(reader, "tokenizer.ggml.add_space_prefix") is True
    assert ("tokenizer.ggml.unknown_token_id" in reader.fields) == (unknown is not None)
    pytest.importorskip("xllamacpp")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(rules))
    theirs.encode_special_tokens = True
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert llama_cpp.tokenize(path, TEXTS) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-bpe", "gpt-2"])
def test_tokenizers_over_bytes_with_a_split_that_llama_cpp_knows(tmp_path: Path, name: str) -> None:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=SPLITS[name].ignore_merges))
    split = pre_tokenizers.Split(tokenizers.Regex(SPLITS[name].regex), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*CONTROL], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([GERMAN_TEXT, "1234 1234 12\n\n\n'll 'LL  x\n x"] * 3, trainer)
    path = convert(model_with(json.loads(backend.to_str()), tmp_path), tmp_path / "m.gguf", "f16")
    assert value(gguf.GGUFReader(path), "tokenizer.ggml.pre") == name
    pytest.importorskip("xllamacpp")
    assert llama_cpp.tokenize(path, TEXTS) == [backend.encode(text).ids for text in TEXTS[:3]] + [
        # "</s>" is text in training, and for llama.cpp where it is not asked to look for control tokens
        backend.encode("▁ <0x41> <").ids + backend.encode("/s>").ids
    ]


def refused(rules: dict[str, Any], folder: Path, message: str) -> None:
    model = model_with(rules, folder)
    with pytest.raises(BadInput, match=message) as caught:
        convert(model, folder / "m.gguf", "f16")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "tokenizer"]


@pytest.mark.parametrize("installed", [True, False])
def test_merges_that_llama_cpp_would_not_keep_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """Training has bc first, then no way to abc from a and bc; llama.cpp merges whatever makes a token.

    Found from the file's fields, so without llama.cpp too.
    """
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: installed)
    refused(over_characters([["b", "c"], ["a", "b"], ["ab", "c"]]), tmp_path, r"'.*abc.*', training has .* llama\.cpp")


def test_an_added_token_takes_no_spaces(tmp_path: Path) -> None:
    """The loader switches its lstrip off, so the file is right: in llama.cpp no token takes spaces either."""
    source = write_byte_level(tmp_path / "source", [GERMAN_TEXT])
    backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    (a, space), new = backend.encode("a ").ids, backend.get_vocab_size()
    backend.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)])
    (tmp_path / "case").mkdir()
    model = model_with(json.loads(backend.to_str()), tmp_path / "case")
    path = convert(model, tmp_path / "m.gguf", "f16")
    assert Tokenizer.from_folder(model).encode("a <x>") == [a, space, new]
    pytest.importorskip("xllamacpp")
    assert llama_cpp.tokenize(path, ["a <x>"]) == [[a, space, new]]


@pytest.mark.parametrize(
    ("model", "trainer", "kind"),
    [
        (models.Unigram(), trainers.UnigramTrainer(vocab_size=99, unk_token="<unk>"), "Unigram"),
        (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(), "WordLevel"),
        (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=99), "WordPiece"),
    ],
)
def test_other_kinds_of_tokenizers(tmp_path: Path, model: object, trainer: object, kind: str) -> None:
    trainer.show_progress = False
    trainer.special_tokens = [AddedToken(token, special=True) for token in ("<unk>", *CONTROL)]
    refused(other_model(model, trainer), tmp_path, f"has a BPE tokenizer, this one is {kind}")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"eos_token_id": 320}, "eos_token_id is 320, but the model has ids 0 to 319"),
        ("config.json", {"eos_token_id": [1, 400]}, r"eos_token_id is \[1, 400\]"),
        ("generation_config.json", {"pad_token_id": -1}, "pad_token_id is -1"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_an_end_of_text_outside_the_vocabulary(
    tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    model = write_model(tmp_path / "model", write_byte_level(tmp_path / "tokenizer", [GERMAN_TEXT]))
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | change))
    with pytest.raises(BadInput, match=message):
        convert(model, tmp_path / "m.gguf", "f16")


def test_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", write_byte_level(tmp_path / "tokenizer", [GERMAN_TEXT]))
    rules = json.loads((model / "tokenizer.json").read_text())
    rules["model"]["vocab"]["zz"] = 320
    (model / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(BadInput, match="its tokenizer has 321 ids, its model 320"):
        convert(model, tmp_path / "m.gguf", "f16")


@pytest.mark.parametrize("form", ["tokenizer_config.json", "chat_template.jinja", "named"])
def test_the_chat_template_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)  # it reads the other files of these tests
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    model = write_model(tmp_path / "model", write_byte_level(tmp_path / "tokenizer", [GERMAN_TEXT]))
    if form == "chat_template.jinja":
        (model / form).write_text(template)
    else:
        config = json.loads((model / "tokenizer_config.json").read_text())
        named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "{{ tools }}"}]
        config["chat_template"] = named if form == "named" else template
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    reader = gguf.GGUFReader(convert(model, tmp_path / "m.gguf", "f16"))
    assert value(reader, "tokenizer.chat_template") == template
    if form == "named":
        assert value(reader, "tokenizer.chat_template.tool_use") == "{{ tools }}"
