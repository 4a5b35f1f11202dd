"""The flags of every program that reads documents."""

from __future__ import annotations

import argparse

from lit_gpt.cli import require_at_least
from lit_gpt.prepare.records import Fields
from lit_gpt.prepare.reject_guard import RejectGuard

TEXT_OTHERWISE = ("content",)
"""Where --text_field is not given: other names of the text column of a table."""


def add_source_flags(parser: argparse.ArgumentParser, *, ids: bool = True) -> None:
    """Add what says how files of documents are read. ids: the program uses the documents' ids."""
    default = Fields()
    add = parser.add_argument
    add("--text_field", help="field that holds the text; a.b is the field b of the object a (default: text; of a table "
        "without it, content)")  # fmt: skip
    if ids:
        add("--id_field", default=default.id, help="field that holds the id; '' for none (default: id)")
    add("--max_reject_fraction", type=float, default=0.001, help="share of lines that may be rejected (%(default)s)")
    add("--allow_damaged_files", action="store_true",
        help="take what can be read of a file that is cut short or damaged, instead of stopping")  # fmt: skip


def fields_of(values: argparse.Namespace) -> Fields:
    """The fields that the parsed flags name."""
    id = getattr(values, "id_field", Fields().id)
    if values.text_field is None:
        return Fields(id=id, otherwise=TEXT_OTHERWISE)
    return Fields(values.text_field, id)


def guard_of(values: argparse.Namespace) -> RejectGuard:
    """The guard that the parsed flags ask for; raises BadInput for values out of range."""
    require_at_least(values, 0, "max_reject_fraction")
    return RejectGuard(values.max_reject_fraction, values.allow_damaged_files)
