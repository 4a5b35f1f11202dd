"""What a tokenizer folder says of one call is off, and no text gives a control token; else the folder is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import lit_gpt.data.tokenizer
from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from tests.support.odd_tokenizers import CONFIG, added, bpe, rules, unigram, write

TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
    "pad_token": "<s>",
}  # fmt: skip
TWICE = {
    "type": "TemplateProcessing", "special_tokens": {},
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    lit_gpt.data.tokenizer._say_once.cache_clear()
    return caplog


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (rules(bpe(), truncation=TRUNCATION), "truncation to 2 ids (the state of one call)"),
        (rules(bpe(), truncation=TRUNCATION | {"stride": 5}), "truncation to 2 ids"),  # the library would panic
        (rules(bpe(), padding=PADDING), "padding (the state of one call)"),
        (rules(bpe(), padding=PADDING | {"strategy": "BatchLongest"}), "padding"),
        (rules(bpe(dropout=0.9)), "BPE dropout 0.9"),
        (rules(bpe(dropout=0.5), truncation=TRUNCATION, padding=PADDING), "truncation to 2 ids, padding, BPE dropout"),
    ],
)
def test_state_of_a_call_is_off_and_said_once(
    tmp_path: Path, said: pytest.LogCaptureFixture, changed: dict[str, Any], words: str
) -> None:
    """The fingerprint is that of the folder as it was before a call left its state there."""
    folder = write(tmp_path / "t", changed)
    tokenizer = Tokenizer.from_folder(folder)
    assert Tokenizer.from_folder(folder).encode_batch(["aaa</", "b"]) == [[3, 3, 3, 10], [4]]
    assert tokenizer.rules()["truncation"] is tokenizer.rules()["padding"] is None
    assert [words in record.message for record in said.records] == [True]
    assert tokenizer.fingerprint == Tokenizer.from_folder(write(tmp_path / "clean", rules(bpe()))).fingerprint


def test_truncation_beside_a_token_of_that_name(tmp_path: Path) -> None:
    model = bpe(vocab=bpe()["vocab"] | {"truncation": 12, "dropout": 13}, dropout=0.9)
    odd = {"model": dict(sorted(model.items(), reverse=True)), **rules(model, truncation=TRUNCATION)}
    assert Tokenizer.from_folder(write(tmp_path / "t", odd)).encode("aaa") == [3, 3, 3]


def test_post_processor_that_repeats_the_text(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    assert Tokenizer.from_folder(write(tmp_path / "t", rules(bpe(), post_processor=TWICE))).encode("ab") == [3, 4]
    assert "its post-processor" in said.text


def test_flags_of_added_tokens_take_nothing_from_a_text(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """A control token's flags mean nothing; those of "T" would swallow the spaces around it."""
    flags = {"lstrip": True, "rstrip": True}
    tokens = [added(2, "</s>", **flags), added(12, "T", special=False, **flags)]
    tokenizer = Tokenizer.from_folder(write(tmp_path / "t", rules(bpe(), added_tokens=tokens)))
    assert tokenizer.encode("a  T b </s> ") == [3, 9, 9, 12, 9, 4, 9, 10, 11, 9]
    assert "spaces taken away beside 'T'" in said.text
    assert not any(token["lstrip"] for token in tokenizer.rules()["added_tokens"] if not token["special"])


def test_an_ordinary_folder_is_loaded_without_a_word(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path / "t", rules(bpe())))
    assert (tokenizer.encode("a</s>"), said.text) == ([3, 10, 11], "")


BYTES = [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
ALL_MERGES = [*bpe()["merges"], ["</", "s>"]]


@pytest.mark.parametrize(
    ("changed", "config", "text", "ids"),
    [
        pytest.param(rules(unigram()), {}, "a</s><s>", [3, 5, 6, 7, 8, 5, 7, 8], id="Unigram"),
        pytest.param(rules(unigram()), {}, "<unk>", [5, 0, 8], id="unknown token of Unigram"),
        pytest.param(
            rules(unigram(), normalizer={"type": "NFKC"}), {}, "a＜/s＞", [3, 5, 6, 7, 8], id="Unigram behind NFKC"
        ),
        pytest.param(
            rules(unigram(vocab=[*unigram()["vocab"], *BYTES, ["0", -3], ["x", -3], ["A", -3]], byte_fallback=True)),
            {}, "<0x0A>\n", [5, 266, 267, 266, 268, 8, 20], id="byte piece",
        ),
        pytest.param(rules(bpe(), added_tokens=[added(2, "</s>", special=False)]), {}, "</s>", [10, 11], id="flag"),
        pytest.param(
            rules(
                bpe(), normalizer={"type": "Lowercase"}, added_tokens=[added(2, "</s>", special=False, normalized=True)]
            ),
            {}, "</S>", [10, 11], id="flag behind lower case",
        ),
        pytest.param(rules(bpe(merges=ALL_MERGES), added_tokens=[]), {}, "a</s>", [3, 10, 11], id="only in vocabulary"),
        pytest.param(rules(bpe(merges=ALL_MERGES)), {}, "a</s>", [3, 10, 11], id="merged"),
        pytest.param(
            rules(bpe(ignore_merges=True, merges=[]), pre_tokenizer={"type": "WhitespaceSplit"}), {}, "a </s>",
            [3, 5, 6, 7, 8], id="whole words",
        ),
        pytest.param(
            rules(bpe(), added_tokens=[added(2, "</s>"), added(12, "<pad>", special=False)]), {"pad_token": "<pad>"},
            "a<pad>", [3, 5, 0, 3, 0, 8], id="pad",
        ),
        pytest.param(
            rules(bpe(), added_tokens=[added(2, "</s>"), added(12, "<a>", special=False)]),
            {"additional_special_tokens": [{"content": "<a>"}]}, "<a>", [5, 3, 8], id="additional",
        ),
        pytest.param(
            rules(
                {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 2, "a": 1}, "unk_token": "<unk>"},
                pre_tokenizer={"type": "WhitespaceSplit"},
            ),
            {"bos_token": None}, "a </s> a", [1, 0, 1], id="WordLevel",
        ),
    ],
)  # fmt: skip
def test_control_tokens_in_a_text_are_made_right(
    tmp_path: Path, changed: dict[str, Any], config: dict[str, Any], text: str, ids: list[int]
) -> None:
    """By the vocabulary: 3 a, 4 b, 5 <, 6 /, 7 s, 8 >, 9 a space, 10 </, 11 s>; 0 is unknown."""
    tokenizer = Tokenizer.from_folder(write(tmp_path / "t", changed, CONFIG | config))
    assert tokenizer.encode(text) == ids
    assert tokenizer.eos_id == 2
    assert tokenizer.decode([2]) == "</s>"
    assert tokenizer.decode([3 if changed["model"]["type"] != "WordLevel" else 1, 2], skip_special_tokens=True) == "a"
    assert {token["id"]: token["content"] for token in tokenizer.rules()["added_tokens"] if token["special"]}[
        2
    ] == "</s>"


def test_fingerprint_tells_ids_made_right_from_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "t", rules(unigram()))
    right = Tokenizer.from_folder(folder).fingerprint
    monkeypatch.setattr(lit_gpt.data.tokenizer, "unreachable", lambda *_: None)
    monkeypatch.setattr(lit_gpt.data.tokenizer, "prove", lambda encoder, texts, _: [[] for _ in texts])
    assert Tokenizer.from_folder(folder).fingerprint != right


GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("changed", "config", "message"),
    [
        (rules(bpe()), {"eos_token": "a"}, "'a' is what texts are made of"),
        (rules(bpe(unk_token="</s>")), {}, r"gives the control token '</s>' \(id 2\)"),
        (rules(bpe()), {"eos_token": 2}, "eos_token 2 is not the text of a token"),
        (rules(bpe()), {"eos_token": ["</s>"]}, "is not the text of a token"),
        (rules(bpe(vocab=bpe()["vocab"] | {"c": 2})), {}, "share the id 2"),
        (rules(bpe(vocab=bpe()["vocab"] | {"c": 4_000_000_000})), {}, "ids up to 4000000000"),
        (rules(bpe(), added_tokens=[added(7, "</s>")]), {}, "'</s>' cannot have the id 7"),
        (rules(unigram(unk_id=None)), {}, "unk_id"),
        (rules(bpe(), pre_tokenizer={"type": "FixedLength", "length": 0}), {}, "chunk size must be non-zero"),  # panics
        (rules(bpe(continuing_subword_prefix="####")), {}, "tokenizer.json is not a tokenizer"),
        (rules(bpe(), normalizer={"type": "Sequence", "normalizers": [GROWING] * 40}), {}, "1e.12 times as long"),
    ],
)
def test_folders_that_cannot_be_made_right_are_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changed: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "t", changed, CONFIG | config)
    with pytest.raises(BadInput, match=message) as raised:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


BYTE_PIECES = {f"<0x{byte:02X}>": 12 + byte for byte in range(256)}


@pytest.mark.parametrize(
    ("changed", "lost"),
    [
        (rules(bpe(unk_token=None)), "'A'"),
        (
            rules(
                bpe(unk_token=None, byte_fallback=True, vocab=bpe()["vocab"] | dict(list(BYTE_PIECES.items())[:128]))
            ),
            "'ß'",
        ),
        (rules(bpe(unk_token=None), pre_tokenizer={"type": "WhitespaceSplit"}), "'A'"),
        (rules(bpe()), None),
        (rules(unigram()), None),
        (rules(bpe(unk_token=None, byte_fallback=True, vocab=bpe()["vocab"] | BYTE_PIECES)), None),
    ],
    ids=["characters", "half of the bytes", "words", "unknown", "unigram", "bytes"],
)
def test_characters_that_would_vanish(tmp_path: Path, changed: dict[str, Any], lost: str | None) -> None:
    """New data is refused; the tokenizer itself still loads, for runs whose data was made with it."""
    tokenizer = Tokenizer.from_folder(write(tmp_path / "t", changed))
    if lost is None:
        tokenizer.require_lossless()
        return
    with pytest.raises(BadInput, match=f"characters such as {lost} would vanish from texts"):
        tokenizer.require_lossless()


def test_added_tokens_of_other_files_are_compared(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "t", rules(bpe()), CONFIG | {"added_tokens_decoder": {"2": {"content": "</s>"}}})
    (folder / "added_tokens.json").write_text('{"</s>": 2}')
    Tokenizer.from_folder(folder)
    assert not said.records
    (folder / "added_tokens.json").write_text('{"</s>": 7, "<neu>": 12}')
    Tokenizer.from_folder(folder)
    assert "not obeyed: '</s>', '<neu>' in added_tokens.json, with other ids than in tokenizer.json" in said.text
    lit_gpt.data.tokenizer._say_once.cache_clear()
    (folder / "added_tokens.json").unlink()
    config = CONFIG | {"added_tokens_decoder": {"12": {"content": "<neu>", "special": True}, "x": 1}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.from_folder(folder)
    assert "'<neu>' in added_tokens_decoder of tokenizer_config.json, with other ids" in said.text


def test_deep_json_and_files_too_large(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", rules(bpe()))
    for name in ("tokenizer_config.json", "tokenizer.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_text("[" * 100_000)
        with pytest.raises(BadInput, match=name):
            Tokenizer.from_folder(folder)
        with (folder / name).open("wb") as file:
            file.truncate(1 << 40)  # sparse
        with pytest.raises(BadInput, match="more than 256 MiB"):
            Tokenizer.from_folder(folder)
        (folder / name).write_bytes(before)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == CONFIG
