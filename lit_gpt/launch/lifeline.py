"""The ranks of a run hold a line to rank 0, so that each learns within seconds that one of them is lost.

Without it, ranks that wait in a collective for one that is gone would wait for its time limit, minutes to hours. (One
that can still speak tells its failure itself: failures.py.) Each rank tells rank 0 every BEAT_S where it is, by a
thread of its own. Rank 0 takes a rank for lost that hangs up without a word (SIGKILL, out of memory), or that is silent
for `silent_s` (SIGSTOP, a node that is gone). It logs one line, the cause, and tells all, who end: within GRACE_S by
themselves, else by their thread, which writes the stacks. If rank 0 is lost, each rank sees it by itself; rank 1 and
the first of each node tell.

Costs: one connection and half a message a second for each rank. A thread that was itself stopped (a suspended job)
counts nobody as silent for that time.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any, NoReturn

from lit_gpt.cli import EXIT_FAILURE
from lit_gpt.launch.cause import ENDED, SILENT, Cause, kill_if_stopped
from lit_gpt.launch.job import node, report_cause
from lit_gpt.launch.stacks import write_stacks

log = logging.getLogger(__name__)

BEAT_S = 2.0
GRACE_S = 5.0
"""A process whose main thread has not ended by then, because it hangs in a collective, is ended by this thread."""
FOUND_S = 10.0
"""Within this a lost rank is found: one that ended at once, a node that is gone by the kernel's own messages."""
CONNECT_S = 25.0
_POLL_S = 0.2


@dataclass
class _Peer:
    """A rank as its line has told of it; rank 0 keeps all, the others that of rank 0."""

    rank: int
    name: str
    host: str
    node: str
    pid: int
    step: int = 0
    place: str = "set-up"
    heard: float = field(default_factory=time.monotonic)
    left: bool = False

    def cause(self, how: str, code: int = EXIT_FAILURE) -> Cause:
        return Cause(self.rank, self.name, self.host, self.node, self.pid, how, code, self.step, self.place)


class Line:
    """One rank's end of the lines; all ranks make theirs after they have met. A single rank has none to hold.

    share: hands rank 0's text to all ranks (a collective). address: where the other ranks reach rank 0. silent_s: after
    so long without a sign of life a rank counts as lost; 0: never. folder: for stacks, and for what `dump` writes of a
    rank that hangs.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        name: str,
        *,
        share: Callable[[str], str],
        address: str,
        silent_s: float,
        first_of_node: bool,
        folder: Path,
        dump: Callable[[Path, int], None],
    ) -> None:
        self._rank, self._folder, self._dump = rank, folder, dump
        self._silent_s = silent_s or float("inf")
        self._speaks = rank == 1 or first_of_node
        self._me = _Peer(rank, name, socket.gethostname(), node(), os.getpid())
        self._secret = ""
        self._peers = {other: _Peer(other, f"rank {other}", "", "", 0) for other in range(1, size)}
        self._lost: Cause | None = None
        self._found, self._closed = threading.Event(), threading.Event()
        self.where: Callable[[], tuple[int, str]] = lambda: (0, "set-up")
        """Updates done, and what the main thread does: told with each beat."""
        self.code_after_silence: Callable[[], int] = lambda: EXIT_FAILURE
        """With which this process ends if another is silent."""
        self._thread: threading.Thread | None = None
        if size == 1:
            return
        listener = _listen(size) if rank == 0 else None
        port, self._secret = share(f"{listener.getsockname()[1]} {token_hex()}" if listener else "").split()
        serve = self._serve if listener else self._hold
        arguments = (listener,) if listener else (address, int(port))
        self._thread = threading.Thread(target=serve, args=arguments, name="lifeline", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """The others need this rank no more: its work is done, or they know why it ends. Waits for none of them."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * BEAT_S)

    @property
    def has_lost_one(self) -> bool:
        """Whether a rank is lost, so that this process is ending."""
        return self._found.is_set()

    def own_cause(self, how: str, code: int) -> Cause:
        """This rank as the cause of the end."""
        self._me.step, self._me.place = self.where()
        return self._me.cause(how, code)

    def end_with_lost_rank(self) -> None:
        """After an error that may follow from the loss of another rank: end this process if one is lost, as is told."""
        if self._thread is not None and self._found.wait(FOUND_S) and self._lost is not None:
            _end_now(self._lost.code)

    def _hello(self) -> bytes:
        who = {"name": self._me.name, "host": self._me.host, "node": self._me.node, "pid": self._me.pid}
        return json.dumps({"rank": self._rank, "secret": self._secret, **who}).encode() + b"\n"

    def _now(self) -> dict[str, Any]:
        step, place = self.where()
        return {"step": step, "place": place}

    # Rank 0

    def _serve(self, listener: socket.socket) -> None:
        selector = selectors.DefaultSelector()
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        buffers: dict[socket.socket, bytes] = {}
        owner: dict[socket.socket, _Peer] = {}
        hello = self._hello()
        looked = beaten = time.monotonic()
        while True:
            for key, _ in selector.select(_POLL_S):
                line = key.fileobj
                assert isinstance(line, socket.socket)
                if line is listener:
                    line = listener.accept()[0]
                    _keep_alive(line)
                    selector.register(line, selectors.EVENT_READ)
                    buffers[line] = b""
                    continue
                data = _receive(line)
                *whole, buffers[line] = (buffers[line] + data).split(b"\n")
                for text in whole:
                    if line not in owner and self._secret.encode() not in text:  # a stranger, such as a scan of ports
                        data = b""
                        break
                    if line not in owner:
                        _send(line, hello)
                    owner[line] = self._heard(json.loads(text))
                if not data:
                    selector.unregister(line)
                    line.close()
                    del buffers[line]
                    lost = owner.pop(line, None)
                    if lost and not lost.left:
                        return self._tell_all(owner, lost.cause(f"{ENDED} without a word (killed, or out of memory)"))
            now = time.monotonic()
            stopped_s = max(now - looked - BEAT_S, 0.0)
            looked = now
            for peer in self._peers.values():
                peer.heard += stopped_s
                if not peer.left and now - peer.heard > self._silent_s:
                    how = f"{SILENT} for {now - peer.heard:.0f} s (stopped, or its node is gone)"
                    return self._tell_all(owner, peer.cause(how))
            if now - beaten >= BEAT_S:
                beaten = now
                for line in owner:
                    _send(line, json.dumps(self._now()).encode() + b"\n")
            if self._closed.is_set() and all(peer.pid for peer in self._peers.values()):  # all have come
                for line in owner:
                    _send(line, b'{"leaves": true}\n')
                return

    def _heard(self, told: dict[str, Any]) -> _Peer:
        """Note what a rank has told; each message begins with its number."""
        rank = told["rank"]
        if "name" in told:
            self._peers[rank] = _Peer(rank, told["name"], told["host"], told["node"], told["pid"])
        peer = self._peers[rank]
        peer.heard = time.monotonic()
        peer.step, peer.place = told.get("step", peer.step), told.get("place", peer.place)
        peer.left |= "leaves" in told
        return peer

    def _tell_all(self, lines: Iterable[socket.socket], cause: Cause) -> None:
        for line in lines:
            _send(line, json.dumps({"cause": asdict(cause)}).encode() + b"\n")
        self._end(cause, tells=True)

    # The other ranks

    def _hold(self, address: str, port: int) -> None:
        zero, buffer = _Peer(0, "rank 0", address, address, 0), b""
        try:
            line = socket.create_connection((address, port), timeout=CONNECT_S)
        except OSError as error:
            if not self._closed.is_set():
                self._end(zero.cause(f"ended: no line to it can be made ({error})"), tells=self._speaks)
            return
        _keep_alive(line)
        line.settimeout(_POLL_S)
        _send(line, self._hello())
        looked = beaten = time.monotonic()
        while True:
            try:
                data = line.recv(1 << 16)
                gone = not data
            except TimeoutError:
                data, gone = b"", False
            except OSError:
                data, gone = b"", True
            *whole, buffer = (buffer + data).split(b"\n")
            now = time.monotonic()
            for text in whole:
                told = json.loads(text)
                if "cause" in told:
                    self._end(Cause(**told["cause"]), tells=False)
                    return
                if "name" in told:
                    zero = _Peer(0, told["name"], told["host"], told["node"], told["pid"])
                zero.step, zero.place = told.get("step", zero.step), told.get("place", zero.place)
                zero.left |= "leaves" in told
                zero.heard = now
            zero.heard += max(now - looked - BEAT_S, 0.0)
            looked = now
            if gone or now - zero.heard > self._silent_s:
                if not zero.left and not self._closed.is_set():
                    how = f"{ENDED} without a word" if gone else f"{SILENT} for {now - zero.heard:.0f} s"
                    self._end(zero.cause(f"{how} (killed, stopped, or its node is gone)"), tells=self._speaks)
                return
            leaves = self._closed.is_set()
            if leaves or now - beaten >= BEAT_S:
                beaten = now
                told = {"leaves": True} if leaves else self._now()
                _send(line, json.dumps({"rank": self._rank, **told}).encode() + b"\n")
            if leaves:
                return

    def _end(self, cause: Cause, *, tells: bool) -> None:
        """Let the main thread end this process; if it does not, end it here, with its stacks."""
        cause = replace(cause, step=max(cause.step, self.where()[0]))  # the others wait for it in its step
        if SILENT in cause.how:
            with suppress(OSError):
                cause = replace(cause, code=self.code_after_silence())
        if tells:
            log.error("%s", cause)
        if self._rank == (1 if cause.rank == 0 else 0):
            report_cause(cause)
        self._lost = cause
        self._found.set()
        if not self._closed.wait(GRACE_S):
            kill_if_stopped(cause, self._me.host)
            self._abort(cause)

    def _abort(self, cause: Cause) -> NoReturn:
        try:
            self._folder.mkdir(exist_ok=True)
            write_stacks(self._folder, self._rank, f"{self._me.name}: {cause}", self._dump)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        finally:
            _end_now(cause.code)


def _end_now(code: int) -> NoReturn:
    """An orderly end would wait for the rank that is lost."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(code)


def _listen(size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=size, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=size)


def _keep_alive(line: socket.socket) -> None:
    """A node that is gone is noticed after about 15 s, by the kernel."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _receive(line: socket.socket) -> bytes:
    try:
        return line.recv(1 << 16)
    except OSError:
        return b""


def _send(line: socket.socket, text: bytes) -> None:
    """Send a line of at most some hundred bytes, which the socket's buffer takes; who is gone is noticed by reading."""
    with suppress(OSError):
        line.sendall(text)
