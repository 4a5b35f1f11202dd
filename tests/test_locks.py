"""Locks: kills, a file system without locks, and locks of one node only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lit_gpt import locks
from lit_gpt.cli import BadInput
from lit_gpt.locks import Lock, LockHeld
from tests.support.no_locks import NO_LOCKS, without_locks
from tests.support.processes import DEAD_PID, names, start, wait_for
from tests.support.training import small_disk

HOLDER = """
with locks.Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(params=["locks", "no locks"])
def patch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file system with or without locks, for this process; returns the code that does it in another."""
    if request.param == "locks":
        return ""
    without_locks(monkeypatch)
    return NO_LOCKS


def holder(patch: str, path: Path) -> subprocess.Popen[str]:
    process = start(patch + HOLDER, path, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_keeps_others_out_until_its_holder_is_killed(tmp_path: Path, patch: str) -> None:
    path = tmp_path / "lock"
    process = holder(patch, path)
    for _ in range(2):
        with pytest.raises(LockHeld, match="another process holds"):
            Lock(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lock(path):
        held = start(patch + HOLDER, path, 0)
        held.communicate()
        assert held.returncode == 1
    with Lock(path):
        pass
    assert names(tmp_path) == ["lock"]


@pytest.mark.slow
def test_waiting_for_a_holder(tmp_path: Path, patch: str) -> None:
    process = holder(patch, tmp_path / "lock")
    code = patch + "with locks.Lock(Path(sys.argv[1]), wait=True): print(time.time())"
    waiting = [start(code, tmp_path / "lock") for _ in range(2)]
    time.sleep(1.5)
    assert [other.poll() for other in waiting] == [None, None]
    killed_at = time.time()
    process.send_signal(signal.SIGKILL)
    process.wait()  # until then it is a zombie, whose pid is taken
    for other in waiting:
        said, _ = other.communicate(timeout=20)
        assert float(said) > killed_at


def test_many_processes_never_hold_one_lock_together(tmp_path: Path, patch: str) -> None:
    """Each adds one to a number that it reads and writes back; every release removes the lock's file."""
    (tmp_path / "number").write_text("0")
    code = (
        patch
        + """locks._POLL_S = 0.002
for _ in range(25):
    with locks.Lock(Path(sys.argv[1]), wait=True, remove=True):
        number = int(Path(sys.argv[2]).read_text())
        time.sleep(0.001)
        Path(sys.argv[2]).write_text(str(number + 1))"""
    )
    processes = [start(code, tmp_path / "lock", tmp_path / "number") for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "100"
    assert names(tmp_path) == ["number"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    without_locks(monkeypatch, number)
    path = tmp_path / "lock"
    with Lock(path):
        assert f"{path} cannot be locked ({os.strerror(number)}): the file lock.owner replaces the lock" in caplog.text
        assert (tmp_path / "lock.owner").read_text().split()[:2] == [locks.host_name(), str(os.getpid())]
        with pytest.raises(LockHeld):
            Lock(path)
    assert names(tmp_path) == ["lock"]


def test_another_refusal_of_the_lock_is_no_reason_for_an_owner_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        Lock(tmp_path / "lock")
    assert names(tmp_path) == ["lock"]


def test_the_owner_of_another_host_is_taken_over_when_it_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_locks(monkeypatch)
    owner = tmp_path / "lock.owner"
    for content in ("elsewhere 7 0badc0de", ""):  # empty: it was killed before it had written its name
        owner.write_text(content)
        with pytest.raises(LockHeld):
            Lock(tmp_path / "lock")
        past = time.time() - locks.STALE_S - 1
        os.utime(owner, (past, past))
        with Lock(tmp_path / "lock"):
            assert owner.read_text().startswith(f"{locks.host_name()} {os.getpid()} ")
        assert names(tmp_path) == ["lock"]
    assert f"{owner} was left behind by process 7 of elsewhere: taken over" in caplog.text


def test_an_owner_touches_its_file_and_says_when_it_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_locks(monkeypatch)
    monkeypatch.setattr(locks, "BEAT_S", 0.02)
    owner = tmp_path / "lock.owner"
    with Lock(tmp_path / "lock"):
        os.utime(owner, (1, 1))
        wait_for(lambda: owner.stat().st_mtime > 1)
        assert "not ours" not in caplog.text
        owner.write_text("elsewhere 7 0badc0de")
        wait_for(lambda: "lock.owner is no longer ours" in caplog.text)
    assert owner.read_text() == "elsewhere 7 0badc0de"  # it is not ours to remove


def test_who_takes_over_from_the_dead_keeps_others_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its claim; one whose maker was killed over it holds off nobody."""
    without_locks(monkeypatch)
    owner, claim = tmp_path / "lock.owner", tmp_path / ".lock.owner.claim"
    dead = f"{locks.host_name()} {DEAD_PID} 0badc0de"
    for content in (f"{locks.host_name()} {os.getppid()} 0badc0de", "elsewhere 7 0badc0de", ""):
        owner.write_text(dead)
        claim.write_text(content)
        with pytest.raises(LockHeld):
            Lock(tmp_path / "lock")
        assert (owner.read_text(), claim.read_text()) == (dead, content)
    past = time.time() - locks.STALE_S - 1
    for content, mtime in ((dead, time.time()), ("elsewhere 7 0badc0de", past), ("", past)):
        owner.write_text(dead)
        claim.write_text(content)
        os.utime(claim, (mtime, mtime))
        with Lock(tmp_path / "lock"):
            assert owner.read_text().startswith(f"{locks.host_name()} {os.getpid()} ")
        assert names(tmp_path) == ["lock"]


def test_with_the_flock_a_dead_owner_of_this_host_needs_no_claim(tmp_path: Path) -> None:
    """So a start that was killed while it took over holds off nobody."""
    (tmp_path / "lock.owner").write_text(f"{locks.host_name()} {DEAD_PID} 0badc0de")
    (tmp_path / ".lock.owner.claim").touch()
    Lock(tmp_path / "lock").close()


@pytest.mark.slow
def test_one_winner_among_many_that_find_a_dead_owner(tmp_path: Path) -> None:
    """Without locks, with a dead owner, and six processes at once: only one at a time holds it."""
    code = """locks._POLL_S = 0.001
with locks.Lock(Path(sys.argv[1]), wait=True):
    os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))
    time.sleep(0.02)
    os.unlink(sys.argv[2])"""
    for _ in range(3):
        (tmp_path / "lock.owner").write_text(f"{locks.host_name()} {DEAD_PID} 0badc0de")
        processes = [start(NO_LOCKS + code, tmp_path / "lock", tmp_path / "inside") for _ in range(6)]
        assert [process.wait() for process in processes] == [0] * 6
    assert names(tmp_path) == ["lock"]


# Locks of one node only

ELSEWHERE = """
import fcntl, socket
fcntl.flock = lambda *_: None
socket.gethostname = lambda: "elsewhere.cluster"
locks.BEAT_S = 0.05
"""
"""Code for a process on another host, whose locks this one does not see."""


def per_node(monkeypatch: pytest.MonkeyPatch, watch_s: float) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(locks, "WATCH_S", watch_s)
    monkeypatch.setattr(locks, "_POLL_S", 0.02)


def test_a_holder_on_another_host_is_seen_by_its_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    per_node(monkeypatch, 20)
    path = tmp_path / "lock"
    process = holder(ELSEWHERE, path)
    with pytest.raises(LockHeld, match=f"another process holds {path}: elsewhere {process.pid} "):
        Lock(path)
    process.kill()
    process.wait()
    monkeypatch.setattr(locks, "WATCH_S", 0.3)
    with Lock(path):
        owner = tmp_path / "lock.owner"
        assert owner.read_text().startswith(f"{locks.host_name()} {os.getpid()} ")
    assert names(tmp_path) == ["lock"]


def test_a_lock_released_or_long_untouched_elsewhere_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_node(monkeypatch, 1000)
    path, owner = tmp_path / "lock", tmp_path / "lock.owner"
    start(ELSEWHERE + "locks.Lock(Path(sys.argv[1])).close()", path).wait()
    Lock(path).close()
    owner.write_text("elsewhere 7 0badc0de")
    past = time.time() - locks.STALE_S - 1
    os.utime(owner, (past, past))
    Lock(path).close()
    owner.write_text(f"{locks.host_name()} {os.getpid()} 0badc0de")  # ours is the flock
    Lock(path).close()
    assert names(tmp_path) == ["lock"]


def test_waiting_for_a_holder_on_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    per_node(monkeypatch, 20)
    process = start(ELSEWHERE + HOLDER, tmp_path / "lock", 0.5)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with Lock(tmp_path / "lock", wait=True):
        assert process.wait() == 0


def test_processes_of_many_hosts_never_hold_one_lock_together(tmp_path: Path) -> None:
    """No flock keeps them apart, and all start at once."""
    code = (
        ELSEWHERE
        + """locks._POLL_S = 0.002
name = sys.argv[3]
socket.gethostname = lambda: name
for _ in range(10):
    with locks.Lock(Path(sys.argv[1]), wait=True):
        os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))
        time.sleep(0.002)
        os.unlink(sys.argv[2])"""
    )
    processes = [start(code, tmp_path / "lock", tmp_path / "inside", f"node{n}") for n in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert names(tmp_path) == ["lock"]


def test_what_was_planted_as_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link is refused; bytes that say nobody are an owner that does not touch."""
    per_node(monkeypatch, 0.1)
    owner = tmp_path / "lock.owner"
    owner.symlink_to(tmp_path / "absent")
    with pytest.raises(BadInput, match="owner is a symbolic link"):
        Lock(tmp_path / "lock")
    owner.unlink()
    for content in (b"", b"\xff\0", b"x" * 5000, b" \n"):
        owner.write_bytes(content)
        Lock(tmp_path / "lock").close()
    assert names(tmp_path) == ["lock"]


def test_a_full_disk_does_not_prevent_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def is_made(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks._OwnerFile, "_is_made", is_made)
    with Lock(tmp_path / "lock"), pytest.raises(LockHeld):
        Lock(tmp_path / "lock")
    assert "lock.owner cannot be written (No space left on device): only the lock keeps others out" in caplog.text


def test_a_full_disk_leaves_no_owner_without_a_name(tmp_path: Path) -> None:
    """Such a file would be somebody's on another host, which the next start has to watch."""
    with small_disk(tmp_path / "disk", size=1 << 20) as disk:
        (disk / "lock").touch()
        with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as others:
            while others.write(bytes(1 << 12)):
                pass
        with Lock(disk / "lock"):
            assert names(disk) == ["lock", "others"]


@pytest.mark.parametrize(("remove", "left"), [(True, []), (False, ["lock"])])
def test_a_signal_while_the_lock_is_taken_leaves_no_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remove: bool, left: list[str]
) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Lock(tmp_path / "lock", remove=remove)
    assert names(tmp_path) == left
    with Lock(tmp_path / "lock"):
        pass
