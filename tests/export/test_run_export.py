"""create.sh --all: exports every checkpoint of a run to a folder, and to a branch of a stand-in Hub, despite faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from lit_gpt.checkpoint.checkpoint import seal
from lit_gpt.checkpoint.record import checkpoint_name
from lit_gpt.cli import BadInput
from lit_gpt.export import hf_export
from lit_gpt.export.run_export import revision_name
from scripts import convert_lit_checkpoint
from tests.support.german_run import STEPS
from tests.support.hub_stand_in import TOKEN, Hub, serving

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "lsx/model"


def test_revision_names() -> None:
    assert revision_name(10_000, 20_971_520_000) == "step-00010000-tokens-21B"
    assert revision_name(1, 0) == "step-00000001-tokens-0"
    assert revision_name(7, 999) == "step-00000007-tokens-999"
    assert revision_name(7, 999_600) == "step-00000007-tokens-1M"
    assert revision_name(99_999_999, 2_999_967_744_000) == "step-99999999-tokens-3T"
    assert revision_name(12, 1_234_567) == "step-00000012-tokens-1.23M"


@pytest.fixture(autouse=True)
def own_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program lowers its priority: called in this process, it would slow down all tests that come after."""
    monkeypatch.setattr(os, "nice", lambda increment: increment)


@pytest.fixture(scope="module")
def names(german_run: Path) -> list[str]:
    """The names of the run's revisions, oldest first."""
    facts = [json.loads((german_run / checkpoint_name(step) / "run.json").read_text()) for step in STEPS]
    return [revision_name(fact["step"], fact["tokens"]) for fact in facts]


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    with serving() as running:
        yield running


def copy_of(run: Path, folder: Path, *steps: int) -> Path:
    """A run folder with some of the run's checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        shutil.copytree(run / checkpoint_name(step), folder / checkpoint_name(step))
    return folder


def environment(tmp_path: Path, address: str, token: str = TOKEN, **variables: str) -> dict[str, str]:
    """The environment of a user who set HF_TOKEN, without Xet, which the stand-in lacks."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "HF_ENDPOINT": address, "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_XET": "1", **variables,
    }  # fmt: skip


def create_all(
    run: Path, tmp_path: Path, address: str, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`create.sh --all --push_to` as a user calls it."""
    return subprocess.run(
        ["bash", str(ROOT / "scripts/create.sh"), "--all", "--push_to", REPOSITORY, "--first_wait_s", "0.01", *more],
        cwd=tmp_path, env=environment(tmp_path, address, OUT_DIR=str(run), **variables),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def revisions(hub: Hub, branch: str) -> list[str]:
    """The titles of a branch's commits, newest first, without the hash of the state."""
    return [title.split()[0] for title in hub.titles(REPOSITORY, branch)]


def assert_no_token(folder: Path, *texts: str) -> None:
    """The token stands in no file of `folder` and in none of the texts."""
    for path in folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    assert not any(TOKEN in text for text in texts)


@pytest.mark.slow
def test_every_checkpoint_becomes_a_branch_through_faults_and_again(
    german_run: Path, names: list[str], hub: tuple[Hub, str], tmp_path: Path
) -> None:
    """Status 500, an upload cut off, a commit whose response is lost; then a later checkpoint, and nothing twice."""
    state, address = hub
    run = copy_of(german_run, tmp_path / "run", *STEPS[:2])
    shutil.copytree(german_run / "datapoints", run / "datapoints")
    state.faults += [
        ("POST /api/repos/create", "500"),
        ("POST .*/branch/.*", "503"),
        ("PUT /large/.*", "cut"),
        ("PUT /large/.*", "500"),
        ("POST .*/commit/step.*", "500"),
        ("POST .*/commit/step.*", "mute"),
        ("GET .*/commits/.*", "502"),
    ]
    done = create_all(run, tmp_path, address)
    assert done.returncode == 0, done.stderr
    assert state.faults == []
    assert done.stderr.count("trying again") >= 4  # the others huggingface_hub tries again by itself
    assert set(state.repositories[REPOSITORY]) == {"main", *names[:2]}
    for name in names[:2]:
        folder = run / "huggingface" / name
        files = [path for path in folder.rglob("*") if path.is_file()]
        written = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        assert {"training_record/report.html", "training_record/steps.parquet"} <= written.keys()
        held = state.files(REPOSITORY, name)
        assert held.pop(".gitattributes")
        assert held == written
        assert revisions(state, name).count(name) == 1, "the commit whose answer was lost was made again"
        assert revisions(state, name)[0] == name
    assert revisions(state, "main") == [names[1], "initial"]

    state.requests.clear()
    copy_of(german_run, run, STEPS[2])
    before = (run / "huggingface" / names[0] / "model.safetensors").stat().st_mtime_ns
    again = create_all(run, tmp_path, address, "--remove_uploaded")
    assert again.returncode == 0, again.stderr
    assert f"{names[0]} is on the Hub already" in again.stderr
    commits = [request for request in state.requests if "/commit/" in request]
    assert commits == [f"POST /api/models/{REPOSITORY}/commit/{branch}" for branch in (names[2], "main")]
    assert len([request for request in state.requests if request.startswith("PUT")]) == 1  # main's weights are there
    assert (run / "huggingface" / names[0] / "model.safetensors").stat().st_mtime_ns == before
    assert not (run / "huggingface" / names[2]).exists()
    assert state.files(REPOSITORY, "main") == state.files(REPOSITORY, names[2])
    assert_no_token(tmp_path, done.stdout, done.stderr, again.stdout, again.stderr)


@pytest.mark.slow
def test_watching_takes_what_appears_and_ends_with_the_last_step(
    german_run: Path, names: list[str], hub: tuple[Hub, str], tmp_path: Path
) -> None:
    """It waits for a Hub that is down, continues after a SIGKILL, and ends with the run's last step."""
    state, address = hub
    run = copy_of(german_run, tmp_path / "run", STEPS[0])
    command = [
        sys.executable, str(ROOT / "scripts/convert_lit_checkpoint.py"), "--run_dir", str(run), "--destination_path",
        str(tmp_path / "out"), "--push_to", REPOSITORY, "--private", "--watch", "--poll_s", "0.2", "--attempts", "2",
        "--first_wait_s", "0.01",
    ]  # fmt: skip

    def start(log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as stderr:
            return subprocess.Popen(command, env=environment(tmp_path, address), stderr=stderr)

    def wait_for(process: subprocess.Popen[bytes], log: Path, words: str) -> None:
        deadline = time.monotonic() + 120
        while words not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    state.faults += [("POST .*/commit/.*", "500")] * 2
    first = start(tmp_path / "first.log")
    wait_for(first, tmp_path / "first.log", "in 2 attempts")
    wait_for(first, tmp_path / "first.log", "branch main")
    copy_of(german_run, tmp_path / "later", *STEPS[1:])
    state.faults += [("POST .*/commit/.*", "503")] * 100
    (tmp_path / "later" / checkpoint_name(STEPS[1])).rename(run / checkpoint_name(STEPS[1]))
    wait_for(first, tmp_path / "first.log", f"could not upload {names[1]}")
    first.kill()
    first.wait()
    assert names[1] not in revisions(state, names[1])
    state.faults.clear()
    second = start(tmp_path / "second.log")
    wait_for(second, tmp_path / "second.log", f"uploaded {names[1]} to {REPOSITORY}, branch main")
    (tmp_path / "later" / checkpoint_name(STEPS[2])).rename(run / checkpoint_name(STEPS[2]))
    assert second.wait(timeout=120) == 0
    assert [revisions(state, name)[0] for name in (*names, "main")] == [*names, names[2]]
    assert state.private[REPOSITORY]
    assert f"{tmp_path / 'out' / names[1]} is there already" in (tmp_path / "second.log").read_text()
    assert_no_token(tmp_path)


@pytest.mark.slow
def test_a_step_that_was_trained_anew_is_not_taken_for_the_one_before(
    german_run: Path, names: list[str], hub: tuple[Hub, str], tmp_path: Path
) -> None:
    state, address = hub
    run = copy_of(german_run, tmp_path / "run", STEPS[0])
    assert create_all(run, tmp_path, address).returncode == 0
    before = state.files(REPOSITORY, names[0])
    path = run / checkpoint_name(STEPS[0])
    trained = torch.load(path / "state.pth", weights_only=True)
    trained["model"]["lm_head.weight"].mul_(1.5)
    torch.save(trained, path / "state.pth")
    (path / "MANIFEST.json").unlink()
    seal(path, path.with_name("new"), json.loads((path / "run.json").read_text()))
    path.with_name("new").rename(path)

    refused = create_all(run, tmp_path, address)
    assert refused.returncode == 2
    assert "was exported from another state of the run" in refused.stderr
    assert state.files(REPOSITORY, names[0]) == before
    shutil.rmtree(run / "huggingface")
    assert create_all(run, tmp_path, address).returncode == 0
    assert revisions(state, names[0])[:2] == [names[0], names[0]]
    assert len(set(state.titles(REPOSITORY, names[0])[:2])) == 2
    for branch in (names[0], "main"):
        assert state.files(REPOSITORY, branch)["model.safetensors"] != before["model.safetensors"]


@pytest.mark.slow
def test_a_stopped_watch_leaves_nothing(german_run: Path, hub: tuple[Hub, str], tmp_path: Path) -> None:
    run = copy_of(german_run, tmp_path / "run", STEPS[0])
    command = [
        sys.executable, str(ROOT / "scripts/convert_lit_checkpoint.py"), "--run_dir", str(run),
        "--destination_path", str(tmp_path / "out"), "--watch",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment(tmp_path, hub[1]), stderr=subprocess.PIPE)
    while process.poll() is None and not list((tmp_path / "out").glob(".*.partial")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, log
    assert not (tmp_path / "out").exists()


def export_all(run: Path, destination: Path, *more: str) -> None:
    convert_lit_checkpoint.main(["--run_dir", str(run), "--destination_path", str(destination), *more])


def assert_only_begun(state: Hub) -> None:
    """The repository has no commit of ours."""
    assert all(commits[0]["title"] == "initial commit" for commits in state.repositories.get(REPOSITORY, {}).values())


@pytest.mark.slow
def test_a_commit_that_the_hub_refuses_is_one_line(german_run: Path, hub: tuple[Hub, str], tmp_path: Path) -> None:
    state, address = hub
    state.faults += [("POST .*/commit/.*", "500")] * 3
    run = copy_of(german_run, tmp_path / "run", STEPS[0])
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/convert_lit_checkpoint.py"), "--run_dir", str(run), "--destination_path",
         str(tmp_path / "out"), "--push_to", REPOSITORY, "--attempts", "3", "--first_wait_s", "0"],
        env=environment(tmp_path, address), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.splitlines()
    assert "error: " in last
    assert re.search("in 3 attempts: .*the same command goes on", last), last
    assert "Traceback" not in done.stderr
    assert_only_begun(state)
    assert_no_token(tmp_path, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("repository", "token", "faults", "message"),
    [
        (REPOSITORY, "wrong", [], "401 .* Log in by `hf auth login`, or set HF_TOKEN"),
        ("other/model", TOKEN, [], "the Hub refuses to open other/model: .*403"),
        ("a/b/c", TOKEN, [], "cannot open a/b/c: HFValidationError"),
        (REPOSITORY, TOKEN, [("POST .*create", "cut")] * 3, "could not open lsx/model in 3 attempts"),
    ],
)
def test_a_repository_that_cannot_be_opened_is_bad_input(
    german_run: Path, hub: tuple[Hub, str], tmp_path: Path, repository: str, token: str,
    faults: list[tuple[str, str]], message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """In this process, where huggingface_hub has read HF_ENDPOINT already."""
    state, address = hub
    state.faults += faults
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", token)
    run = copy_of(german_run, tmp_path / "run", STEPS[0])
    with pytest.raises(BadInput, match=message) as refused:
        export_all(run, tmp_path / "out", "--push_to", repository, "--attempts", "3", "--first_wait_s", "0")
    assert state.faults == []
    assert_only_begun(state)
    assert_no_token(tmp_path, str(refused.value), caplog.text)


@pytest.mark.slow
def test_a_checkpoint_that_retention_removes_meanwhile_is_passed_over(
    german_run: Path, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Removed as training does it, after the hashes were checked and before the weights are read."""
    run = copy_of(german_run, tmp_path / "run", *STEPS[:2])
    proofs = hf_export.require_same_ids

    def prune_then_prove(*arguments: object, **more: object) -> None:
        doomed = run / checkpoint_name(STEPS[0])
        if doomed.exists():
            doomed.rename(run / f".removing-{doomed.name}")
            shutil.rmtree(run / f".removing-{doomed.name}")
        proofs(*arguments, **more)

    monkeypatch.setattr(hf_export, "require_same_ids", prune_then_prove)
    export_all(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [names[1]]
    ours = [record for record in caplog.records if record.name.startswith("lit_gpt")]  # torchao warns of the machine
    warnings = [record.getMessage() for record in ours if record.levelname == "WARNING"]
    expected = f"passing over {checkpoint_name(STEPS[0])}: it was removed meanwhile (keep_last_checkpoints of the run)"
    assert warnings == [expected]


def test_a_damaged_checkpoint_is_named_and_the_others_are_exported(
    german_run: Path, names: list[str], tmp_path: Path
) -> None:
    run = copy_of(german_run, tmp_path / "run", *STEPS)
    state = run / checkpoint_name(STEPS[1]) / "state.pth"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    (run / checkpoint_name(STEPS[2]) / "run.json").write_text("{")
    with pytest.raises(BadInput, match=f"damaged: {checkpoint_name(STEPS[1])}, {checkpoint_name(STEPS[2])}$"):
        export_all(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [names[0]]


def test_a_folder_that_was_exported_otherwise_is_not_taken_for_the_export(
    german_run: Path, names: list[str], tmp_path: Path
) -> None:
    run = copy_of(german_run, tmp_path / "run", STEPS[0])
    export_all(run, tmp_path / "out")
    config = tmp_path / "out" / names[0] / "config.json"
    fields = json.loads(config.read_text())
    assert fields.pop("pad_token_id") == fields["eos_token_id"]
    for content in (config.read_text(), json.dumps(fields)):  # the second as earlier versions wrote it
        config.write_text(content)
        made = (tmp_path / "out" / names[0]).stat().st_mtime_ns
        export_all(run, tmp_path / "out")
        assert (tmp_path / "out" / names[0]).stat().st_mtime_ns == made
        assert config.read_text() == content
    with pytest.raises(BadInput, match="was exported with other options than now"):
        export_all(run, tmp_path / "out", "--dtype", "fp32")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run_dir", "absent"], "--run_dir absent: no such folder"),
        (["--checkpoint", "x", "--watch"], "--push_to and --watch go with --run_dir"),
        (["--run_dir", ".", "--private"], "go with --push_to"),
        (["--run_dir", ".", "--poll_s", "0"], r"--poll_s 0\.0: must be at least 0\.1"),
        (["--run_dir", ".", "--checkpoint", "x"], "not allowed with argument"),
        ([], "one of the arguments --checkpoint --run_dir is required"),
    ],
)
def test_flags_that_contradict_each_other(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        convert_lit_checkpoint.main([*flags, "--destination_path", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
