"""The tokenizer gives the published ids, reads control tokens in a text as text, and refuses other folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import lit_gpt.data.tokenizer
from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from tests.support.small_tokenizer import write_byte_level

TEXT = "Der Bär läuft.\n\nDie Bärin    läuft auch: 12 km/h!\n\n\n </s> Straße \r\n Ende <s>"


def copy(source: Path, target: Path, *, without: tuple[str, ...] = ()) -> Path:
    target.mkdir()
    for path in source.iterdir():
        if path.name not in without:
            shutil.copyfile(path, target / path.name)
    return target


def golden(shared: Path) -> list[dict]:
    return json.loads((shared / "tokenizer/golden_ids.json").read_text(encoding="utf-8"))["cases"]


def byte_level(folder: Path) -> Path:
    """A byte-level BPE like GPT-2's, whose configuration forbids an added space: it must not become a Metaspace one."""
    return write_byte_level(folder, [TEXT] * 3, {"eos_token": "</s>", "legacy": False, "add_prefix_space": False})


def llama_like(folder: Path, **config: object) -> Path:
    """A tiny Metaspace BPE with the converted prepend_scheme="first", and "\\n" as an added token."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "<", "/", "s", ">", "n", "d"]
    backend = Backend(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [("▁", "a"), ("a", "b")],
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", left=1)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in pieces[:3]])
    backend.add_tokens([AddedToken("\n", normalized=True)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return folder


def test_published_ids(shared: Path) -> None:
    tokenizer = Tokenizer.from_folder(shared / "tokenizer")
    cases = golden(shared)
    assert len(cases) == 57
    assert tokenizer.encode_batch([case["text"] for case in cases]) == [case["ids"] for case in cases]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32_010, 1, 2)


def test_published_ids_from_sentencepiece_model(shared: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(copy(shared / "tokenizer", tmp_path / "sp", without=("tokenizer.json",)))
    assert [tokenizer.encode(case["text"]) for case in golden(shared)] == [case["ids"] for case in golden(shared)]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32_010, 1, 2)


def test_published_decode_inverts_encode(shared: Path) -> None:
    tokenizer = Tokenizer.from_folder(shared / "tokenizer")
    for text in (" führendes Leerzeichen", "zwei  Leerzeichen\n", "Tab\tstop", "Straße, Größe </s>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("make", [llama_like, byte_level])
def test_control_tokens_in_a_text_stay_text(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    tokenizer = Tokenizer.from_folder(make(tmp_path / "t"))
    ids = tokenizer.encode("ab</s>ab<s>")
    assert tokenizer.eos_id not in ids
    assert len(ids) > 6
    assert tokenizer.decode(ids) == "ab</s>ab<s>"
    assert tokenizer.decode([*ids, tokenizer.eos_id], skip_special_tokens=True) == "ab</s>ab<s>"


def test_prefix_override_is_for_llama_type_tokenizers_that_ask_for_it(tmp_path: Path) -> None:
    """Ids by the vocabulary of `llama_like`: 3 "▁", 4 "a", 6 "▁a", 7 "ab"."""
    as_converted = Tokenizer.from_folder(llama_like(tmp_path / "a"))
    assert as_converted.encode("ab a") == [6, 5, 6]
    legacy = Tokenizer.from_folder(llama_like(tmp_path / "b", legacy=True, add_prefix_space=False))
    assert legacy.encode("ab a") == [6, 5, 6]
    bare = Tokenizer.from_folder(llama_like(tmp_path / "c", legacy=False, add_prefix_space=False))
    assert bare.encode("ab a") == [7, 6]
    assert bare.decode(bare.encode(" a ab")) == " a ab"


def test_byte_level_tokenizer_is_left_as_it_is(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "t")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    text = " Der Bär läuft, die Bärin auch."
    assert Tokenizer.from_folder(folder).encode(text) == backend.encode(text).ids


def test_long_texts_in_parts_give_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_folder(llama_like(tmp_path / "t", legacy=False, add_prefix_space=False))
    text = "ab a\n\n\nb ab\n" * 40 + "a" * 90 + "\n ab"
    whole = tokenizer.encode(text)
    for size in (1, 2, 3, 7, 50, 97):
        monkeypatch.setattr(lit_gpt.data.tokenizer, "PART_CHARACTERS", size)
        assert len(tokenizer._parts(text)) > 1
        assert "".join(tokenizer._parts(text)) == text
        assert tokenizer.encode_batch([text, "ab", text]) == [whole, [7], whole]


def test_published_tokenizer_in_parts(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_folder(shared / "tokenizer")
    text = "".join(case["text"] + "\n" for case in golden(shared))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(lit_gpt.data.tokenizer, "PART_CHARACTERS", 100)
    assert len(tokenizer._parts(text)) > 100
    assert tokenizer.encode(text) == whole


def test_tokenizers_that_look_across_newlines_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's pattern joins a newline with the spaces behind it: there, only the whole is exact."""
    monkeypatch.setattr(lit_gpt.data.tokenizer, "PART_CHARACTERS", 10)
    assert len(Tokenizer.from_folder(byte_level(tmp_path / "gpt"))._parts(TEXT)) == 1
    assert len(Tokenizer.from_folder(llama_like(tmp_path / "prefixing"))._parts(TEXT)) == 1


def test_fingerprint_names_files_and_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llama_like(tmp_path / "a")
    first = Tokenizer.from_folder(folder).fingerprint
    assert len(first) == 64
    assert Tokenizer.from_folder(copy(folder, tmp_path / "b")).fingerprint == first
    (tmp_path / "b/README.md").write_text("not part of the tokenizer")
    assert Tokenizer.from_folder(tmp_path / "b").fingerprint == first
    (tmp_path / "b/added_tokens.json").write_text("{}")
    assert Tokenizer.from_folder(tmp_path / "b").fingerprint != first
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [1])  # as if the library split otherwise
    assert Tokenizer.from_folder(folder).fingerprint != first


def test_a_file_of_a_folder_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(BadInput, match=f"that is a file; give its folder, {tmp_path}$"):
        Tokenizer.from_folder(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no such folder"),
        ({}, "neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.model": b"\x80\x04junk"}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"{,"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"}, "no JSON object"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, files: dict[str, bytes] | None, message: str) -> None:
    folder = tmp_path / "t"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as raised:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(raised.value)


def test_control_tokens_must_exist(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="eos_token '<end>' is not in its vocabulary"):
        Tokenizer.from_folder(llama_like(tmp_path / "a", eos_token="<end>"))
    with pytest.raises(BadInput, match="names no eos_token"):
        Tokenizer.from_folder(llama_like(tmp_path / "b", eos_token=None))


def test_nothing_in_a_folder_is_executed(tmp_path: Path) -> None:
    """A malicious pickle beside and in place of the tokenizer's files (faults.md, 22)."""
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    folder = llama_like(tmp_path / "t")
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    (folder / "tokenization_evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput):
        Tokenizer.from_folder(folder)
    assert not (tmp_path / "executed").exists()
