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
from lit_gpt.files import read_json, write_json

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
    """Write tokenizer.json and tokenizer_config.json; BadInput if BOS is wanted but the tokenizer has none."""
    rules = tokenizer.rules()
    contents = {token["id"]: token["content"] for token in rules["added_tokens"]}
    bos = contents[tokenizer.bos_id] if tokenizer.bos_id is not None else None
    if add_bos and bos is None:
        raise BadInput("the training data begins each document with a BOS, but its tokenizer has none")
    if add_bos:
        rules["post_processor"] = _bos_template(bos, tokenizer.bos_id)
    write_json(folder / "tokenizer.json", rules)
    tokens = {"bos_token": bos, "eos_token": contents[tokenizer.eos_id], "unk_token": rules["model"].get("unk_token")}
    settings = {
        "tokenizer_class": PLAIN_CLASS,
        **{name: token for name, token in tokens.items() if token is not None},
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        # else transformers 4 gives generate() token types, which LLaMA does not take
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings)


def chat_template(folder: Path) -> Any:
    """The folder's chat template (Jinja), or its list of named ones, or None: in the file of transformers 5 or 4."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return read_json(config).get("chat_template") if config.is_file() else None


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
