"""Publishing, removing, hashing and torn lines: right values, kills, full disks, NFS."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
import xxhash

from lit_gpt import files
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.line_log import whole_lines
from lit_gpt.files import (
    OWN_JSON_BYTES,
    publish,
    publishing,
    publishing_new,
    read_json,
    sweep,
    write_json,
    xxh3,
)
from lit_gpt.locks import host_name
from tests.support.processes import DEAD_PID, names, start, wait_for
from tests.support.training import small_disk

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
    mine = f"{host_name()}-{os.getpid()}.partial"
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
    assert names(tmp_path) == [f".a.{host_name()}-{killed.pid}.partial", "a"]
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_told_with_path_and_size(tmp_path: Path, number: int) -> None:
    def fail(partial: Path) -> None:
        partial.write_bytes(bytes(1234))
        raise OSError(number, "said by the system")

    for size, said in ((None, "1,234 bytes were written"), (5678, "1,234 of 5,678 bytes were written")):
        with pytest.raises(OSError, match=said) as raised, files.publishing(tmp_path / "a", size=size) as partial:
            fail(partial)
        assert (raised.value.errno, raised.value.filename) == (number, str(tmp_path / "a"))
    assert names(tmp_path) == []


def test_sweeping_takes_what_was_left_behind_and_nothing_else(tmp_path: Path) -> None:
    host = host_name()
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

    mine = f"{host_name()}-{os.getpid()}.partial"
    for name in ("a", "model", "model.gguf"):
        plant(f".{name}.{mine}")
        plant(f".{name}.partial")
    plant("a.partial")
    plant(f".b.{host_name()}-{DEAD_PID}.partial")
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
    left = [".model.lock", ".model.lock.owner", f".model.{host_name()}-{killed.pid}.partial"]
    assert names(tmp_path) == sorted(left)
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


def on_nfs(monkeypatch: pytest.MonkeyPatch, opened: str) -> None:
    """As NFS while a file named `opened` is open: removing it renames it, and the new name cannot be removed."""
    real = os.unlink

    def unlink(path: str | Path, *, dir_fd: int | None = None) -> None:
        name = os.path.basename(path)
        if name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        if name == opened:
            os.rename(path, os.path.join(os.path.dirname(path), ".nfs0001"), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)


def test_a_folder_with_an_open_file_on_nfs_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "build"
    for part in ("runs", "shards"):
        (folder / part).mkdir(parents=True)
        for name in ("a", "lock", "z"):
            (folder / part / name).touch()
    with monkeypatch.context() as patched:
        on_nfs(patched, "lock")
        for _ in range(2):  # the second time only the name of NFS is there
            files.discard(folder)
            left = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
            assert left == ["runs/.nfs0001", "shards/.nfs0001"]
    files.discard(folder)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(path: str, *, dir_fd: int | None = None) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    (tmp_path / "build").mkdir()
    (tmp_path / "build/a").touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        with pytest.raises(OSError, match="Input/output error"):
            files.discard(tmp_path / "build")
    files.discard(tmp_path / "absent")


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
    path.write_text(json.dumps({"a": "x" * (16 << 20)}))
    with pytest.raises(BadInput, match="has 16,777,225 bytes; at most 16,777,216 are read"):
        read_json(path)
    assert len(read_json(path, OWN_JSON_BYTES)["a"]) == 16 << 20


def cut_array(path: Path) -> None:
    with files.publishing(path) as partial:
        partial.write_bytes(b"abc")
        raise OSError("100001 requested and 64496 written")


def test_an_array_for_which_there_was_no_room(tmp_path: Path) -> None:
    """numpy says so without an errno."""
    with pytest.raises(OSError, match="No space left on device; 3 bytes were written") as told:
        cut_array(tmp_path / "a.npy")
    assert told.value.errno == errno.ENOSPC
    assert names(tmp_path) == []
