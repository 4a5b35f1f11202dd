"""A report that follows a live run: served on loopback, at an address that holds a token.

Invariants: it listens on 127.0.0.1 unless told otherwise, and answers nothing without the token: other users of a
machine can reach its loopback. It reads files only. A page is built when a file of the run has changed, one at a time,
and not again before PAUSE_SHARE times what it took, so that a large run does not keep a core busy.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from lit_gpt.cli import BadInput
from lit_gpt.report.run_page import run_page
from lit_gpt.report.run_view import read_runs

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOOK_S = 5.0
"""Seconds between two looks of an open page."""
PAUSE_SHARE = 5
FILES = (
    "metrics.csv", "samples.jsonl", "settings.yaml", "datapoints/run.json", "datapoints/verified.json",
    "watchdog/rank-00000.json", ".",
)  # fmt: skip
"""Of a run folder: what changes with the run; the folder itself changes with its checkpoints."""


class _Built(NamedTuple):
    content: bytes
    tag: str
    files: tuple[object, ...]
    """What the files were like."""
    again_at: float
    """On the monotonic clock."""


class LivePage:
    """The newest page of some runs; may be asked by several threads."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._built: _Built | None = None

    def newest(self) -> tuple[bytes, str]:
        """The page, and a tag that changes with it. Raises BadInput if a folder is gone."""
        with self._lock:
            files = tuple(_state(folder / name) for folder in self._folders for name in FILES)
            if self._built is None or (files != self._built.files and time.monotonic() >= self._built.again_at):
                began = time.monotonic()
                content = run_page(read_runs(self._folders), live_s=LOOK_S).html().encode()
                took = time.monotonic() - began
                tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                self._built = _Built(content, tag, files, time.monotonic() + PAUSE_SHARE * took)
            return self._built.content, self._built.tag


class ReportServer(ThreadingHTTPServer):
    """Serves one page; `address` is where."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int, host: str = LOOPBACK) -> None:
        """port: 0 takes a free one. Raises BadInput if the port or the host cannot be had."""
        self.page = LivePage(folders)
        self.page.newest()  # a folder that is none is refused now
        self.path = f"/{secrets.token_urlsafe(24)}/"
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            wrong_host = isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
            way_out = "--host takes an address of this machine, or 0.0.0.0 for all of them"
            way_out = way_out if wrong_host else "--serve 0 takes a free port"
            raise BadInput(f"--serve {port} --host {host}: {error}; {way_out}") from None

    @property
    def address(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}{self.path}"


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version, sys_version = "report", ""

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def _answer(self, *, with_content: bool) -> None:
        if not hmac.compare_digest(self.path.encode("utf-8", "surrogateescape"), self.server.path.encode()):
            self._send(HTTPStatus.NOT_FOUND, b"no such page; the address needs its token\n", with_content=with_content)
            return
        try:
            content, tag = self.server.page.newest()
        except (BadInput, OSError) as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode(), with_content=with_content)
            return
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", tag=tag, with_content=False)
        else:
            self._send(HTTPStatus.OK, content, kind="text/html", tag=tag, with_content=with_content)

    def _send(
        self, status: HTTPStatus, content: bytes, *, kind: str = "text/plain", tag: str = "", with_content: bool
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content)), "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", **({"ETag": tag} if tag else {}),
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, format: str, *values: object) -> None:
        log.debug(format, *values)


def _state(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
