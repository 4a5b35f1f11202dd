"""Write the tokenizer so that transformers' AutoTokenizer gives the ids our models were trained on.

It is written, not copied, because versions of transformers read an original folder differently (LlamaTokenizer derives
its own rules from a few flags, whatever tokenizer.json says). The written tokenizer.json holds the rules that training
used, and the plain class that takes them as they are. A text begins with BOS only if the training data had it. There is
one intended difference: a control token spelled out in a text is that token, as chat templates need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.files import read_json, read_text, write_json

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers 4 and 5 that takes tokenizer.json as it is."""

TRICKY_TEXTS = (
    "Hallo Welt",
    "  zwei Leerzeichen, drei   dazwischen",
    "Tab\t, Zeile\n\nund Absatz\r\n",
    "Straße, Größe, ÄÖÜäöüß – „Anführung“ … €",
    "$PATH < { } ~ ^ ` \\ ▁_",
    "e\u0301 🐑 漢字 \u0000\u200b",
    "1234567890 3,14159",
)
"""Where tokenizers are known to differ: beginnings, runs of spaces, added tokens, unknown characters."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, block_size: int, add_bos: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template of the tokenizer's folder, if it has one.

    BadInput if BOS is wanted but the tokenizer has none, or if a chat template is no text.
    """
    rules = tokenizer.rules()
    contents = {token["id"]: token["content"] for token in rules["added_tokens"]}
    bos = contents[tokenizer.bos_id] if tokenizer.bos_id is not None else None
    if add_bos and bos is None:
        raise BadInput("the training data begins each document with a BOS, but its tokenizer has none")
    if add_bos:
        rules["post_processor"] = _bos_template(bos, tokenizer.bos_id)
    write_json(folder / "tokenizer.json", rules)
    eos = contents[tokenizer.eos_id]
    tokens = {"bos_token": bos, "eos_token": eos, "unk_token": rules["model"].get("unk_token"), "pad_token": eos}
    settings = {
        "tokenizer_class": PLAIN_CLASS,
        **{name: token for name, token in tokens.items() if token is not None},
        "padding_side": "left",  # generation goes on from a row's right end
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        # else transformers 4 gives generate() token types, which LLaMA does not take
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if (template := chat_template(tokenizer.folder)) is not None:
        settings["chat_template"] = template  # here both versions of transformers, and others, look for it
    write_json(folder / "tokenizer_config.json", settings)


def chat_template(folder: Path) -> str | list[dict[str, str]] | None:
    """The folder's chat template (Jinja), its list of named ones, or None; BadInput if one is no text.

    transformers 5 has a file for each template; before, they stood in tokenizer_config.json.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    named = [{"name": name, "template": read_text(path)} for name, path in files.items() if path.is_file()]
    if named:
        return named[0]["template"] if [entry["name"] for entry in named] == ["default"] else named
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if template is None:
        return None
    for entry in template if isinstance(template, list) else [{"name": "default", "template": template}]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise BadInput(f"{config}: chat_template is no text, and no list of texts with names")
    return template


def _bos_template(bos: str | None, bos_id: int | None) -> dict[str, Any]:
    """The post-processor that puts `bos` before each text, as tokenizer.json states it."""

    def part(kind: str, id: str | None, type_id: int) -> dict[str, Any]:
        return {kind: {"id": id, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [part("SpecialToken", bos, 0), part("Sequence", "A", 0)],
        "pair": [
            *(part("SpecialToken", bos, 0), part("Sequence", "A", 0)),
            *(part("SpecialToken", bos, 1), part("Sequence", "B", 1)),
        ],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def require_same_ids(
    tokenizer: Tokenizer, encode: Callable[[str], Sequence[int]], texts: Sequence[str], *, add_bos: bool
) -> None:
    """Raise BadInput unless `encode`, transformers' tokenizer from the written folder, gives our ids for every text."""
    for text in texts:
        ours = [tokenizer.bos_id] * add_bos + tokenizer.encode(text)
        if (theirs := list(encode(text))) != ours:
            raise BadInput(
                f"transformers reads the tokenizer differently: {text!r} is {theirs[:9]} there, {ours[:9]} in training"
            )
