"""The exported tokenizer in transformers' AutoTokenizer: it gives the training's ids and the published golden ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export.hf_tokenizer import TRICKY_TEXTS, require_same_ids, write_tokenizer
from tests.support.small_tokenizer import write_byte_level


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """A folder with a small byte-level tokenizer."""
    return write_byte_level(tmp_path / "source", ["Hallo Welt, hallo Wald"] * 9)


def exported(source: Path, folder: Path, *, add_bos: bool = False) -> tuple[Tokenizer, AutoTokenizer]:
    tokenizer = Tokenizer.from_folder(source)
    folder.mkdir()
    write_tokenizer(tokenizer, folder, block_size=2048, add_bos=add_bos)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


def test_published_tokenizer_gives_the_golden_ids_through_transformers(shared: Path, tmp_path: Path) -> None:
    ours, theirs = exported(shared / "tokenizer", tmp_path / "out")
    cases = json.loads((shared / "tokenizer" / "golden_ids.json").read_text())["cases"]
    assert len(cases) == 57
    for case in cases:
        assert theirs(case["text"]).input_ids == case["ids"]
        assert theirs.decode(case["ids"]) == ours.decode(case["ids"])
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert (len(theirs), theirs.model_max_length) == (32_010, 2048)
    require_same_ids(ours, lambda text: theirs(text).input_ids, TRICKY_TEXTS, add_bos=False)


def test_bos_is_put_first_if_the_data_has_it(shared: Path, tmp_path: Path) -> None:
    ours, theirs = exported(shared / "tokenizer", tmp_path / "out", add_bos=True)
    assert theirs("Hallo Welt").input_ids == [1, 31942, 30808, 822]
    require_same_ids(ours, lambda text: theirs(text).input_ids, TRICKY_TEXTS, add_bos=True)


@pytest.mark.parametrize("add_bos", [False, True])
def test_byte_level(byte_level: Path, tmp_path: Path, add_bos: bool) -> None:
    ours, theirs = exported(byte_level, tmp_path / "out", add_bos=add_bos)
    require_same_ids(ours, lambda text: theirs(text).input_ids, TRICKY_TEXTS, add_bos=add_bos)
    for text in TRICKY_TEXTS:
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert theirs("</s>").input_ids[-1] == ours.eos_id


@pytest.mark.parametrize("form", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"])
def test_the_chat_template_goes_with_the_tokenizer(byte_level: Path, tmp_path: Path, form: str) -> None:
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    if form == "tokenizer_config.json":
        (byte_level / form).write_text(json.dumps(config | {"chat_template": template}))
    else:
        (byte_level / "chat_template.jinja").write_text(template)
    if form == "additional_chat_templates":
        (byte_level / form).mkdir()
        (byte_level / form / "tool_use.jinja").write_text("{{ tools }}ü")
    _, theirs = exported(byte_level, tmp_path / "out")
    chat = [{"role": "user", "content": "Hallo"}, {"role": "assistant", "content": "Welt"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "Hallo</s>Welt</s>"
    assert theirs.apply_chat_template(chat).input_ids == theirs("Hallo</s>Welt</s>").input_ids
    if form == "additional_chat_templates":
        assert theirs.apply_chat_template(chat, tools=[], chat_template="tool_use", tokenize=False) == "[]ü"


@pytest.mark.parametrize("template", [5, {}, ["x"], [{"name": "a"}], b"\xff"])
def test_a_chat_template_that_is_no_text(byte_level: Path, tmp_path: Path, template: object) -> None:
    if isinstance(template, bytes):
        (byte_level / "chat_template.jinja").write_bytes(template)
    else:
        config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
        (byte_level / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"chat_template(\.jinja)? is no text") as caught:
        exported(byte_level, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_other_ids_are_refused_with_both(byte_level: Path) -> None:
    ours = Tokenizer.from_folder(byte_level)
    with pytest.raises(BadInput, match=r"'Hallo' is \[7\] there"):
        require_same_ids(ours, lambda _: [7], ["Hallo"], add_bos=False)


def test_bos_that_the_tokenizer_lacks(byte_level: Path, tmp_path: Path) -> None:
    (byte_level / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(BadInput, match="begins each document with a BOS"):
        write_tokenizer(Tokenizer.from_folder(byte_level), tmp_path, block_size=9, add_bos=True)
