"""Publishing, locking, hashing and torn lines: right values, kills, full disks, a file system without locks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from lit_gpt import files
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.line_log import whole_lines
from lit_gpt.files import (
    Lock,
    LockHeld,
    publish,
    publishing,
    publishing_new,
    read_json,
    sweep,
    write_json,
    xxh3,
)
from tests.support.no_locks import NO_LOCKS, without_locks
from tests.support.training import small_disk

ROOT = str(Path(__file__).resolve().parents[1])
DEAD_PID = 2**22 + 1  # above the largest that Linux gives


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process that runs the code; sys and files are imported."""
    begin = "import os, signal, sys, time\nfrom pathlib import Path\nfrom lit_gpt import files\n"
    return subprocess.Popen(
        [sys.executable, "-c", begin + code, *map(str, arguments)], env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


# Publishing


def test_publish_replaces_a_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    publish(path, [b"one", memoryview(b"two")])
    assert path.read_bytes() == b"onetwo"
    publish(path, iter([b"three"]))
    assert path.read_bytes() == b"three"
    assert names(tmp_path) == ["a.bin"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    publish(path, [b"old"])
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), publishing(path) as partial:  # noqa: PT012 (a failure in the middle)
            partial.write_bytes(b"half")
            raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_everything_is_on_disk_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    publish(tmp_path / "a", [b"1"])
    mine = f"{files._host()}-{os.getpid()}.partial"
    assert calls == [f"fsync .a.{mine}", "rename", "fsync ."]
    calls.clear()
    with publishing(tmp_path / "b", folder=True) as folder:
        (folder / "inner").mkdir()
        (folder / "inner/x").touch()
        (folder / "y").touch()
    before = {f"fsync .b.{mine}{part}" for part in ("", "/inner", "/inner/x", "/y")}
    assert set(calls[:4]) == before
    assert calls[4:] == ["rename", "fsync ."]


KILLED = """
path, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "at the rename":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def parts():
    yield b"new " * 100_000
    if moment == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
files.publish(path, parts())
"""


@pytest.mark.parametrize("moment", ["while writing", "at the rename"])
def test_a_kill_leaves_the_old_file_and_what_is_swept(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "a"
    publish(path, [b"old"])
    killed = start(KILLED, path, moment)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == [f".a.{files._host()}-{killed.pid}.partial", "a"]
    sweep(tmp_path)
    assert names(tmp_path) == ["a"]


def test_two_processes_publish_one_file_each_whole(tmp_path: Path) -> None:
    code = "for _ in range(200): files.publish(Path(sys.argv[1]), [sys.argv[2].encode() * 50_000])"
    writers = [start(code, tmp_path / "a", letter) for letter in "xy"]
    wait_for((tmp_path / "a").exists)
    while any(writer.poll() is None for writer in writers):
        content = (tmp_path / "a").read_bytes()
        assert content in (b"x" * 50_000, b"y" * 50_000)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert names(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size=1 << 20) as disk:
        publish(disk / "a", [b"old"])
        with pytest.raises(OSError, match="No space left") as raised:
            publish(disk / "a", (bytes(1 << 16) for _ in range(100)))
        assert raised.value.errno == errno.ENOSPC
        assert (disk / "a").read_bytes() == b"old"
        assert names(disk) == ["a"]


def test_sweeping_takes_what_was_left_behind_and_nothing_else(tmp_path: Path) -> None:
    host = files._host()
    dead = [f".a.{host}-{DEAD_PID}.partial", f".model.gguf.{host}-{DEAD_PID}.partial"]
    alive = [f".a.{host}-{os.getppid()}.partial", ".a.elsewhere-7.partial"]
    earlier = ["a.partial", ".a.partial"]  # names of earlier versions, which say no process
    others = ["a", "a.new", "b.partial.txt", "partial", ".model.other.partial"]
    for name in (*dead, *alive, *earlier, *others):
        (tmp_path / name).touch()
    (tmp_path / f".d.{host}-{DEAD_PID}.partial").mkdir()
    (tmp_path / f".d.{host}-{DEAD_PID}.partial/x").touch()
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*alive, *earlier, *others])
    sweep(tmp_path, "model", alone=True)  # not those of model.other, which somebody else may write
    assert names(tmp_path) == sorted([*alive, *earlier, *others])
    day_ago = time.time() - 90_000
    os.utime(tmp_path / alive[1], (day_ago, day_ago))
    sweep(tmp_path)
    assert names(tmp_path) == sorted([alive[0], *earlier, *others])
    sweep(tmp_path, "a", alone=True)
    assert names(tmp_path) == sorted(others)
    sweep(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "hard link", "dangling link"])
def test_what_was_planted_under_a_temporary_name_is_not_written_to(tmp_path: Path, kind: str) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    (victim / "inner").mkdir(parents=True)
    (victim / "file").write_text("precious")
    run.mkdir()

    def plant(name: str) -> None:
        planted = run / name
        if kind == "hard link":
            os.link(victim / "file", planted)
        else:
            target = {"link to a file": "file", "link to a folder": "inner", "dangling link": "absent"}[kind]
            planted.symlink_to(victim / target)

    mine = f"{files._host()}-{os.getpid()}.partial"
    for name in ("a", "model", "model.gguf"):
        plant(f".{name}.{mine}")
        plant(f".{name}.partial")
    plant("a.partial")
    plant(f".b.{files._host()}-{DEAD_PID}.partial")
    publish(run / "a", [b"ours"])
    with publishing_new(run / "model", folder=True) as folder:
        (folder / "weights").write_text("ours")
    with publishing_new(run / "model.gguf", folder=False) as file:
        file.write_text("ours")
    sweep(run, alone=True)
    assert {str(path.relative_to(run)) for path in run.rglob("*")} == {"a", "model", "model.gguf", "model/weights"}
    assert not any(path.is_symlink() for path in run.rglob("*"))
    assert {str(path.relative_to(victim)) for path in victim.rglob("*")} == {"file", "inner"}
    assert (victim / "file").read_text() == "precious"


def test_links_planted_as_lock_or_destination_are_refused(tmp_path: Path) -> None:
    (tmp_path / ".model.lock").symlink_to(tmp_path / "victim")
    (tmp_path / "taken").symlink_to(tmp_path / "absent")
    with (
        pytest.raises(BadInput, match=r"\.model\.lock is a symbolic link"),
        publishing_new(tmp_path / "model", folder=True),
    ):
        pass
    with pytest.raises(BadInput, match="exists already"), publishing_new(tmp_path / "taken", folder=True):
        pass
    assert names(tmp_path) == [".model.lock", "taken"]


# Publishing what must not exist yet


def test_a_new_folder_is_whole_or_leaves_nothing(tmp_path: Path) -> None:
    destination = tmp_path / "new" / "parent" / "model"
    with pytest.raises(ZeroDivisionError), publishing_new(destination, folder=True) as folder:
        (folder / "x").write_text(f"{1 / 0}")
    assert list(tmp_path.iterdir()) == []
    with publishing_new(destination, folder=True) as folder:
        (folder / "x").write_text("2")
        assert not destination.exists()
    assert (destination / "x").read_text() == "2"
    assert [path.name for path in destination.parent.iterdir()] == ["model"]
    with pytest.raises(BadInput, match="exists already"), publishing_new(destination, folder=True):
        pass


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    for name, folder in (("file", False), ("folder", True)):
        said = "appeared meanwhile: nothing was published"
        with pytest.raises(BadInput, match=said), publishing_new(tmp_path / name, folder=folder) as partial:  # noqa: PT012
            (partial / "x" if folder else partial).write_text("ours")
            (tmp_path / name).write_text("theirs")
        assert (tmp_path / name).read_text() == "theirs"
    assert names(tmp_path) == ["file", "folder"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    killed = start(
        """with files.publishing_new(Path(sys.argv[1]), folder=True) as folder:
    (folder / "old").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)""",
        tmp_path / "model",
    )
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".model.lock", f".model.{files._host()}-{killed.pid}.partial"]
    (tmp_path / ".model.partial").mkdir()  # of an earlier version
    (tmp_path / ".model.partial/old").touch()
    with publishing_new(tmp_path / "model", folder=True) as folder:
        (folder / "new").write_text("2")
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


def test_two_writers_of_one_destination(tmp_path: Path) -> None:
    with publishing_new(tmp_path / "model", folder=True) as folder:
        (folder / "x").write_text("first")
        code = """try:
    with files.publishing_new(Path(sys.argv[1]), folder=True): pass
except files.BadInput as error:
    print(error)"""
        said, _ = start(code, tmp_path / "model").communicate()
        assert said == f"{tmp_path / 'model'} is being written by another process\n"
        assert (folder / "x").read_text() == "first"
    assert (tmp_path / "model/x").read_text() == "first"
    assert names(tmp_path) == ["model"]


def test_an_unwritable_destination_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BadInput, match=r"cannot write .*file/model: Not a directory"),
        publishing_new(tmp_path / "file/model", folder=True),
    ):
        pass


# Locking


HOLDER = """
with files.Lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read() if len(sys.argv) == 2 else time.sleep(60)
"""


@pytest.fixture(params=["locks", "no locks"])
def patch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file system with or without locks, for this process; returns the code that does it in another."""
    if request.param == "locks":
        return ""
    without_locks(monkeypatch)
    return NO_LOCKS


def holder(patch: str, path: Path) -> subprocess.Popen[str]:
    process = start(patch + HOLDER, path, "until killed")
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
        held = start(patch + HOLDER, path)
        held.communicate()
        assert held.returncode == 1
    with Lock(path):
        pass
    assert names(tmp_path) == ["lock"]


@pytest.mark.slow
def test_waiting_for_a_holder(tmp_path: Path, patch: str) -> None:
    process = holder(patch, tmp_path / "lock")
    code = patch + "with files.Lock(Path(sys.argv[1]), wait=True): print(time.time())"
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
        + """files._POLL_S = 0.002
for _ in range(25):
    with files.Lock(Path(sys.argv[1]), wait=True, remove=True):
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
        assert (tmp_path / "lock.owner").read_text().split()[:2] == [files._host(), str(os.getpid())]
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
        past = time.time() - files.STALE_S - 1
        os.utime(owner, (past, past))
        with Lock(tmp_path / "lock"):
            assert owner.read_text().startswith(f"{files._host()} {os.getpid()} ")
        assert names(tmp_path) == ["lock"]
    assert f"{owner} was left behind by process 7 of elsewhere: taken over" in caplog.text


def test_an_owner_touches_its_file_and_says_when_it_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_locks(monkeypatch)
    monkeypatch.setattr(files, "BEAT_S", 0.02)
    owner = tmp_path / "lock.owner"
    with Lock(tmp_path / "lock"):
        os.utime(owner, (1, 1))
        wait_for(lambda: owner.stat().st_mtime > 1)
        assert "not ours" not in caplog.text
        owner.write_text("elsewhere 7 0badc0de")
        wait_for(lambda: "lock.owner is no longer ours" in caplog.text)
    assert owner.read_text() == "elsewhere 7 0badc0de"  # it is not ours to remove


@pytest.mark.slow
def test_one_winner_among_many_that_find_a_dead_owner(tmp_path: Path) -> None:
    """Without locks, with a dead owner, and six processes at once: only one at a time holds it."""
    code = """files._POLL_S = 0.001
with files.Lock(Path(sys.argv[1]), wait=True):
    os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))
    time.sleep(0.02)
    os.unlink(sys.argv[2])"""
    for _ in range(3):
        (tmp_path / "lock.owner").write_text(f"{files._host()} {DEAD_PID} 0badc0de")
        processes = [start(NO_LOCKS + code, tmp_path / "lock", tmp_path / "inside") for _ in range(6)]
        assert [process.wait() for process in processes] == [0] * 6
    assert names(tmp_path) == ["lock"]


# Hashing and reading


def test_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"")
    assert xxh3(path) == "2d06800538d394c2"  # of no bytes, from the specification of XXH3
    data = os.urandom(1000)
    path.write_bytes(data)
    monkeypatch.setattr(files, "_HASH_CHUNK_BYTES", 64)
    assert xxh3(path) == xxhash.xxh3_64_hexdigest(data)


def test_a_torn_tail_is_left_out_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = ['{"a": "ä\u2028\x0b\x85"}\n', "\n", "1,2\r\n", "last\n"]  # one line to JSON, several to str.splitlines
    whole = "".join(lines).encode()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert whole_lines(path) == lines[: whole[:size].count(b"\n")]


def test_a_log_whose_writer_is_killed_reads_whole(tmp_path: Path) -> None:
    code = """with open(sys.argv[1], "wb", buffering=0) as file:
    for number in range(10**9):
        file.write(b"%d:" % number)
        file.write(b"%d\\n" % number)"""
    for _ in range(50):
        process = start(code, tmp_path / "log")
        wait_for(lambda: (tmp_path / "log").exists() and (tmp_path / "log").stat().st_size > 1000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert whole_lines(tmp_path / "log")[:1] == ["0:0\n"]
        assert all(line == f"{number}:{number}\n" for number, line in enumerate(whole_lines(tmp_path / "log")))
        if not (tmp_path / "log").read_bytes().endswith(b"\n"):
            return
        (tmp_path / "log").unlink()
    raise AssertionError("no kill tore a line")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": "ä"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ä"\n}\n'
    assert read_json(path) == {"a": "ä"}
    with pytest.raises(BadInput, match=r"cannot read .*absent: No such file"):
        read_json(tmp_path / "absent")
    for content, said in (("{", "is not JSON"), ("[]", "holds no JSON object")):
        path.write_text(content)
        with pytest.raises(BadInput, match=said):
            read_json(path)
