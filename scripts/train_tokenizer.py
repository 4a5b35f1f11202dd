"""Train a byte-level BPE tokenizer: decode(encode(text)) == text for any Unicode text, no unknown token.

Writes a folder (tokenizer.json, tokenizer_config.json, special_tokens_map.json) from which lit_gpt.data.tokenizer and
transformers' AutoTokenizer give the same ids. The same input gives the same files, bit by bit.

Example: python scripts/train_tokenizer.py --source corpus/ --destination_path tokenizers/german --vocab_size 32000
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not
from lit_gpt.cli import BadInput, Parser, command_line, run_program
from lit_gpt.data.tokenizer import NEWLINES, Tokenizer
from lit_gpt.files import publish, sweep, write_json
from lit_gpt.prepare.document_source import read_documents
from lit_gpt.prepare.records import Document
from lit_gpt.prepare.source_files import KINDS, open_sources
from lit_gpt.prepare.source_flags import add_source_flags, fields_of, guard_of

# isort: split
# After lit_gpt, which says what to do where it is missing.
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS, EOS = "<s>", "</s>"
MIN_VOCABULARY = 256 + 2
"""One token a byte, and the two control tokens."""

WORDS = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
"""Pre-tokenization: no merge crosses these pieces. Words keep the space before them and their combining marks (ü as
u + U+0308); there are no English contractions. Each digit is a piece, as in LLaMA 2 and the published LLäMmlein: it
means the same in every number, and a small vocabulary need not hold the thousand groups of three digits."""

LOG_INTERVAL_S = 10
WORD_CHARACTERS = 512
"""Longer words are trained on in parts, since training takes time by the square of a word's length; so no token is
longer. The bound is no rule of the tokenizer itself: where no word is longer, it changes no byte of it."""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_arguments(argv)
    fields, guard = fields_of(args), guard_of(args)
    sources = open_sources(args.source, fields, allow_damaged_files=args.allow_damaged_files)
    folder = Path(args.destination_path)
    if (folder / "tokenizer.json").exists():
        raise BadInput(f"{folder} already holds a tokenizer: delete it or choose another --destination_path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write to --destination_path {folder}: {error.strerror}") from None
    log.info("reading %s", ", ".join(args.source))
    counts: Counter[str] = Counter()
    backend = train(counted(read_documents(sources, fields, guard), counts), args.vocab_size)
    if not counts["documents"]:
        raise BadInput(f"no document with a text in {', '.join(args.source)} (text field: {fields.text!r})")
    write_folder(backend, folder)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size < args.vocab_size:
        log.warning("the text gave %d tokens only, not the %d asked for", tokenizer.vocab_size, args.vocab_size)
    log.info("trained on %s; rejected %d lines", so_far(counts), guard.rejects)
    log.info("wrote %s: vocabulary %d, fingerprint %s", folder, tokenizer.vocab_size, tokenizer.fingerprint)
    log.info("next: %s", next_command(args, folder))
    return None


def next_command(args: argparse.Namespace, folder: Path) -> str:
    """That tokenizes the same documents, to the folder `data` beside the tokenizer's."""
    words = ["--source", *args.source, "--tokenizer_path", folder, "--destination_path", folder.parent / "data"]
    words += ["--text_field", args.text_field] if args.text_field else []
    words += ["--allow_damaged_files"] if args.allow_damaged_files else []
    return command_line("scripts/prepare_data.py", *words)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--source", type="path", nargs="+", action="extend", required=True, help=f"files, or folders of them: {KINDS}"
    )
    parser.add_argument("--destination_path", type="path", required=True, help="folder to write")
    parser.add_argument(
        "--vocab_size", type=int, default=32_000, help="tokens, control tokens included (default 32000)"
    )
    add_source_flags(parser, ids=False)
    parser.add_argument("--id_field", help=argparse.SUPPRESS)  # of earlier versions; ids do not matter here
    args = parser.parse_args(argv)
    if args.vocab_size < MIN_VOCABULARY:
        raise BadInput(
            f"--vocab_size {args.vocab_size}: must be at least {MIN_VOCABULARY} (256 bytes and {BOS}, {EOS})"
        )
    return args


def counted(documents: Iterator[Document], counts: Counter[str]) -> Iterator[str]:
    """The texts of all documents; logs what was read every LOG_INTERVAL_S, and at the end."""
    told = time.monotonic()
    for document in documents:
        counts["documents"] += 1
        counts["bytes"] += len(document.text_bytes)
        if time.monotonic() - told >= LOG_INTERVAL_S:
            told = time.monotonic()
            log.info("read %s", so_far(counts))
        yield document.text
    log.info("read %s; now the merges are learned", so_far(counts))


def so_far(counts: Counter[str]) -> str:
    return f"{counts['documents']:,} documents, {counts['bytes'] / 1e6:,.1f} MB of text"


def train(documents: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    newline_runs = pre_tokenizers.Split(tokenizers.Regex(NEWLINES), "isolated")
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = pre_tokenizers.FixedLength(length=WORD_CHARACTERS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([newline_runs, words, parts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=WORD_CHARACTERS,
    )
    backend.train_from_iterator(documents, trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([newline_runs, words, to_bytes])
    return backend


def write_folder(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Write the tokenizer's folder; tokenizer.json comes last, because it makes the folder a tokenizer."""
    control = {"bos_token": BOS, "eos_token": EOS}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **control,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "split_special_tokens": True,  # "</s>" in a text stays text, as in training
    }
    for name, content in (("special_tokens_map.json", control), ("tokenizer_config.json", settings)):
        write_json(folder / name, content)
    sweep(folder, "tokenizer.json")
    publish(folder / "tokenizer.json", [backend.to_str(pretty=True).encode()])


if __name__ == "__main__":
    run_program(main)
