"""A model repository on the Hugging Face Hub that holds whole folders: each on a branch, pushed in one commit.

A branch holds a folder if its newest commit has the folder's title. The commit is one request after all uploads, so an
interrupted push leaves nothing half done, and the next push completes it. Transient failures (no connection, a
time-out, status 408, 429 or 5xx) are retried, with waits that double; others (no permission, no such owner) are raised
at once. Only huggingface_hub handles the token.
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
"""Base of the HTTP library's errors; versions of huggingface_hub have used three such libraries so far."""
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_ALWAYS_THERE = ".gitattributes"
"""Made by the Hub: it says which files are large."""


class UploadFailed(Exception):
    """All attempts failed; the network or the Hub may work again later."""


class RetryPolicy(NamedTuple):
    """How often a request is tried, and the seconds between."""

    attempts: int
    first_wait_s: float
    longest_wait_s: float = 300.0

    def waits_s(self) -> list[float]:
        """Seconds between the attempts."""
        return [min(self.first_wait_s * 2**n, self.longest_wait_s) for n in range(self.attempts - 1)]


class HubRepository:
    """The model repository `name`, "owner/model"; created if missing. Raises BadInput if the Hub refuses, UploadFailed
    if all attempts fail; so do its methods."""

    def __init__(self, name: str, retries: RetryPolicy, *, private: bool) -> None:
        self.name = name
        self._retries = retries
        self._api = HfApi()
        for library in ("httpx", "httpx2"):  # they log a line per request
            logging.getLogger(library).setLevel(logging.WARNING)
        self._try(f"open {name}", lambda: self._api.create_repo(name, exist_ok=True, private=private or None))

    def title(self, branch: str) -> str | None:
        """The title of the branch's newest commit; None where there is no such branch."""

        def newest() -> str | None:
            try:
                commits = self._api.list_repo_commits(self.name, revision=branch)
            except RevisionNotFoundError:
                return None
            return commits[0].title if commits else None

        return self._try(f"look at {branch}", newest)

    def push(self, folder: Path, title: str, branch: str) -> None:
        """Replace what `branch` holds by the folder's files, in a commit with this title, unless that is done."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]

        def commit() -> None:
            if self.title(branch) == title:  # an earlier attempt's commit went through, but its response was lost
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
        """The result of `call`; BadInput if the Hub refuses it, UploadFailed if every attempt fails."""
        for wait_s in (*self._retries.waits_s(), None):
            try:
                return call()
            except (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
                raise BadInput(f"cannot {what}: {_first_line(error)}") from None
            except (_HTTP_ERROR, OSError, RuntimeError) as error:  # an upload's threads raise RuntimeError
                status = _status(error)
                if status is not None and status not in _TRANSIENT_STATUS:
                    raise BadInput(f"the Hub refuses to {what}: {_first_line(error)}{_advice(status)}") from None
                if wait_s is None:
                    failed = f"could not {what} in {self._retries.attempts} attempts: {_first_line(error)}"
                    raise UploadFailed(failed) from error
                log.warning("could not %s: %s; trying again in %g s", what, _first_line(error), wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last attempt returned or raised")


def _status(error: BaseException) -> int | None:
    """The HTTP status that caused `error`, if there was a response."""
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
