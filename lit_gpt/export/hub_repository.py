"""A model repository on the Hugging Face Hub, as a place for whole folders: each a branch, put there in one commit.

A revision is there when its branch's newest commit bears its name. The commit comes after all uploads and is one
request, so a push that was cut off, at whatever point, leaves no half of a revision and is taken up by the next. What
may pass (no connection, a time-out, an answer 408, 429 or 5xx) is tried again, with waits that double; what will not
(no permission, no such owner) is told at once. The token is huggingface_hub's own business: nothing here sees it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from lit_gpt.cli import BadInput

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAIN = "main"
_HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""Base of the errors of the HTTP library that the installed huggingface_hub is built on: there were three so far."""
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_ALWAYS_THERE = ".gitattributes"
"""The Hub's own file: it says which files are large."""


class UploadFailed(Exception):
    """Not uploaded after all attempts: the network or the Hub may be well again later."""


class Patience(NamedTuple):
    """How long a request is tried."""

    attempts: int
    first_wait_s: float
    longest_wait_s: float = 300.0

    def waits_s(self) -> list[float]:
        """Between the attempts."""
        return [min(self.first_wait_s * 2**n, self.longest_wait_s) for n in range(self.attempts - 1)]


class HubRepository:
    """The model repository `name`, "owner/model"; made where it is missing."""

    def __init__(self, name: str, patience: Patience, *, private: bool) -> None:
        self.name = name
        self._patience = patience
        self._api = HfApi()
        for library in ("httpx", "httpx2"):  # a line a request
            logging.getLogger(library).setLevel(logging.WARNING)
        self._try(f"open {name}", lambda: self._api.create_repo(name, exist_ok=True, private=private or None))

    def title(self, branch: str) -> str | None:
        """The title of the branch's newest commit, which says what it holds; None where there is no such branch."""

        def newest() -> str | None:
            try:
                commits = self._api.list_repo_commits(self.name, revision=branch)
            except RevisionNotFoundError:
                return None
            return commits[0].title if commits else None

        return self._try(f"look at {branch}", newest)

    def push(self, folder: Path, title: str, branch: str) -> None:
        """Make `folder`'s files all that `branch` holds, under this title; nothing if it is so already."""
        additions = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]

        def commit() -> None:
            if self.title(branch) == title:  # an earlier attempt's commit, whose answer was lost
                return
            if branch != MAIN:
                self._api.create_branch(self.name, branch=branch, exist_ok=True)
            old = set(self._api.list_repo_files(self.name, revision=branch)) - {_ALWAYS_THERE}
            stale = sorted(old - {addition.path_in_repo for addition in additions})
            self._api.create_commit(
                self.name, [*map(CommitOperationDelete, stale), *additions], commit_message=title, revision=branch
            )

        self._try(f"upload {title} to {self.name}, branch {branch}", commit)

    def _try(self, what: str, call: Callable[[], Result]) -> Result:
        """`call`'s result; BadInput if the Hub refuses it, UploadFailed if it failed in every attempt."""
        for wait_s in (*self._patience.waits_s(), None):
            try:
                return call()
            except (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
                raise BadInput(f"cannot {what}: {_first_line(error)}") from None
            except (_HTTP_ERROR, OSError, RuntimeError) as error:  # threads of an upload end in a RuntimeError
                status = _status(error)
                if status is not None and status not in _PASSING_STATUS:
                    raise BadInput(f"the Hub refuses to {what}: {_first_line(error)}{_advice(status)}") from None
                if wait_s is None:
                    failed = f"could not {what} in {self._patience.attempts} attempts: {_first_line(error)}"
                    raise UploadFailed(failed) from error
                log.warning("could not %s: %s; trying again in %g s", what, _first_line(error), wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last attempt returned or raised")


def _status(error: BaseException) -> int | None:
    """The HTTP status that caused `error`, if it came that far."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code
        cause = cause.__cause__
    return None


def _advice(status: int) -> str:
    if status in (401, 403):
        return ". Log in by `hf auth login`, or set HF_TOKEN, with a token that may write there"
    return ""


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return f"{type(cause).__name__}: {str(cause).strip()}".splitlines()[0]
