"""The stage pii: e-mail addresses and public IP addresses are masked. Each mask is a row of the ledger.

The patterns are datatrove's (PIIFormatter), but an IPv4 address does not begin or end inside a longer number or
version, and an e-mail address is looked for around each "@" only: on a line of letters and dots without end the
pattern alone would take the square of its length. A document without "@" or four numbers with dots costs two searches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.formatters.pii import PIIFormatter, public_ip_validator

from lit_gpt.corpus.draft import Draft, Mask
from lit_gpt.corpus.settings import MaskSettings
from lit_gpt.corpus.task import Task

STAGE = "pii"
_DOTTED = re.compile(r"\d\.\d")
_REACH = 255
"""Characters before and after an "@" in which its address is looked for; RFC 5321 allows 64 and 255."""


class MaskStep(PipelineStep):
    name = "mask addresses"
    type = "formatter"

    def __init__(self, settings: MaskSettings, task: Task) -> None:
        super().__init__()
        self._settings, self._task = settings, task
        patterns = PIIFormatter()
        self._email = patterns.emails_replacer.regex
        self._ip = re.compile(rf"(?<![\d.])(?:{patterns.ip_replacer.regex.pattern})(?![\d]|\.\d)")

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        for draft in data:
            if "@" in draft.text:
                self._mask(draft, "email", _addresses(self._email, draft.text), self._settings.email_replacement)
            if _DOTTED.search(draft.text):
                found = (match for match in self._ip.finditer(draft.text) if public_ip_validator(match[0]))
                self._mask(draft, "ip_address", found, self._settings.ip_replacement)
            yield draft

    def _mask(self, draft: Draft, rule: str, found: Iterator[re.Match[str]], replacement: str) -> None:
        masks: dict[int, list[Mask]] = {}
        for match in found:
            if match[0] == replacement:
                continue
            paragraph, mask = draft.source_mask(match.start(), match.end(), replacement)
            masks.setdefault(paragraph, []).append(mask)
        if masks:
            draft.mask(masks)
            self._task.mask(draft, STAGE, rule, [(number, mask) for number, those in masks.items() for mask in those])


def _addresses(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """The e-mail addresses, from left to right."""
    done, at = 0, text.find("@")
    while at >= 0:
        match = pattern.search(text, max(done, at - _REACH), at + 1 + _REACH) if at >= done else None
        if match:
            done = match.end()
            yield match
        at = text.find("@", at + 1)
