"""--serve: on loopback only, nothing without the token, and a page that changes with the run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from lit_gpt.cli import BadInput
from lit_gpt.report import serve
from lit_gpt.report.serve import LivePage, ReportServer
from scripts import report
from tests.support.programs import INTERRUPTIBLE, ROOT, environment
from tests.support.run_folder import RecordedRun, killed_and_resumed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReportServer]:
    with ReportServer([killed_and_resumed(tmp_path_factory.mktemp("served") / "run")], 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def ask(server: ReportServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection(str(server.server_address[0]), int(server.server_address[1]), timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, dict(answer.getheaders())


def test_only_the_whole_token_opens_the_page(server: ReportServer) -> None:
    status, content, headers = ask(server, server.path)
    assert status == 200
    assert b"<h1>run</h1>" in content
    assert b' data-live="5"' in content
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert len(server.path) > 30
    for path in (
        "/",
        "",
        "/report.html",
        server.path[:-1],
        server.path[:-2],
        f"{server.path}x",
        "/%00",
        "/../" + "a" * 5000,
    ):
        status, content, _ = ask(server, path)
        assert (status, b"no such page" in content) == (404, True), path
    assert ask(server, server.path, "HEAD")[:2] == (200, b"")
    assert ask(server, server.path, "POST")[0] == 501


def test_it_listens_on_loopback_and_each_start_has_its_own_token(server: ReportServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with ReportServer([server.page._folders[0]], 0) as other:
        assert other.path != server.path


def test_an_unchanged_page_is_not_sent_again(server: ReportServer) -> None:
    tag = ask(server, server.path)[2]["ETag"]
    assert ask(server, server.path, **{"If-None-Match": tag})[:2] == (304, b"")
    assert ask(server, server.path, **{"If-None-Match": '"other"'})[0] == 200


def test_the_page_is_built_again_when_the_run_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PAUSE_SHARE", 0)
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.step(1, loss=7.5)
    page = LivePage([run.folder])
    first = page.newest()
    assert page.newest() is first or page.newest() == first
    run.step(2, loss=7.25)
    content, tag = page.newest()
    assert tag != first[1]
    assert b"7.2500" in content
    run.end()
    monkeypatch.setattr(serve, "PAUSE_SHARE", 1e9)
    slow = LivePage([run.folder])
    before = slow.newest()
    (run.folder / "samples.jsonl").write_text("")
    assert slow.newest() == before  # its cost allows no other yet


def test_a_run_that_is_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PAUSE_SHARE", 0)
    folder = killed_and_resumed(tmp_path / "run")
    with ReportServer([folder], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shutil.rmtree(folder)
        status, content, _ = ask(server, server.path)
        assert (status, b"no such folder" in content) == (503, True)
        server.shutdown()


def test_bad_input(tmp_path: Path, server: ReportServer) -> None:
    run = str(server.page._folders[0])
    for argv, said in (
        ([run, "--serve", "0", "--output", "x.html"], "choose one"),
        ([run, "--host", "0.0.0.0"], "goes with --serve"),
        ([run, "--serve", str(server.server_address[1])], "Address already in use; --serve 0 takes a free port"),
        ([run, "--serve", "70000"], "--serve 70000"),
        (
            [run, "--serve", "0", "--host", "203.0.113.9"],
            "--host 203.0.113.9: .*; --host takes an address of",
        ),
        ([str(tmp_path / "no"), "--serve", "0"], "no such folder"),
    ):
        with pytest.raises(BadInput, match=said):
            report.main(argv)


@pytest.mark.slow
def test_the_program_says_its_address_and_ends_at_ctrl_c(server: ReportServer) -> None:
    command = [
        *INTERRUPTIBLE,
        sys.executable,
        str(ROOT / "scripts/report.py"),
        str(server.page._folders[0]),
        "--serve",
        "0",
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/\n", address)
    assert process.stdout.readline().startswith("from another machine: ssh -L ")
    process.send_signal(2)
    process.communicate(timeout=60)
    assert process.returncode == 0
