"""The Slurm route without Slurm: stand-ins for sbatch and squeue, whose jobs are run here, one after the other."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.cli import BadInput
from lit_gpt.corpus.corpus_builder import build, run_element
from lit_gpt.corpus.settings import CorpusSettings
from lit_gpt.corpus.slurm import LOGS, step_settings
from tests.corpus.conftest import Build, made_up, write_documents
from tests.corpus.test_paragraph_dedup import bytes_of
from tests.support.programs import executable


class Queue:
    """A folder of stand-ins: sbatch gives each job a number and writes its words down; squeue prints who is alive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        executable(
            folder / "sbatch", f'n=$(ls {folder} | wc -l); printf "%s\\n" "$@" > {folder}/$n.job; echo "$n;here"'
        )
        executable(folder / "squeue", f"cat {folder}/alive")
        (folder / "alive").touch()

    def alive(self, *numbers: str) -> None:
        (self.folder / "alive").write_text("".join(f"{number}\n" for number in numbers))

    def jobs(self) -> dict[str, list[str]]:
        """In the order of their numbers, which begin with 3."""
        paths = sorted(self.folder.glob("*.job"), key=lambda path: int(path.stem))
        return {path.stem: path.read_text().splitlines() for path in paths}


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return Queue(tmp_path / "bin")


def settings_of(source: Path, out: Path, **more: Any) -> CorpusSettings:
    values: dict[str, Any] = {
        "stages": ["paragraph_dedup", "pii"], "part_bytes": 1, "executor": "slurm", "tasks": 2, **more,
    }  # fmt: skip
    made = CorpusSettings(source=[str(source)], destination_path=str(out), **values)
    made.check()
    return made


def step(out: Path) -> Any:
    return build(step_settings(out), lambda progress: None, is_step=True)


def arrays_of(queue: Queue) -> Iterator[tuple[str, str, int]]:
    """Number, name and elements of the arrays that were submitted."""
    for number, words in queue.jobs().items():
        found = [re.fullmatch(r"--array=0-(\d+)(%\d+)?", word) for word in words]
        command = shlex.split(words[-1].removeprefix("--wrap=exec "))
        for match in filter(None, found):
            yield number, command[3], int(match[1]) + 1


def run_array(queue: Queue, out: Path, monkeypatch: pytest.MonkeyPatch, but: tuple[int, ...] = ()) -> str:
    """Run the elements of the array that was submitted last, but those; returns its job's name."""
    *_, (_, name, elements) = arrays_of(queue)
    for element in set(range(elements)) - set(but):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(element))
        run_element(out, name)
    return name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_documents(tmp_path / f"in/{number}.jsonl", made_up(12, number))
    return tmp_path / "in"


def test_steps_and_arrays_make_the_same_bytes(
    build_corpus: Build, source: Path, tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element of the first array is lost; later the step that submitted an array is started again."""
    build_corpus(source, tmp_path / "whole", stages=["paragraph_dedup", "pii"], part_bytes=1)
    out = tmp_path / "out"
    settings = settings_of(source, out, slurm_partition="long", workers=5, slurm_options=["account=web"])
    assert build(settings, lambda progress: None) is None
    queue.alive("3")
    assert build(settings, lambda progress: None) is None, "it is in the queue: nothing is submitted"
    with pytest.raises(BadInput, match="in Slurm's queue as 3: wait for it, or scancel"):
        build_corpus(source, out, stages=["paragraph_dedup", "pii"], part_bytes=1)
    queue.alive()

    assert step(out) is None
    assert run_array(queue, out, monkeypatch, but=(1,)) == "pass-0"
    assert step(out) is None
    assert run_array(queue, out, monkeypatch) == "pass-0"
    assert step(out) is None
    queue.alive("8")
    assert step(out) is None, "the array is in the queue: the step waits for it"
    queue.alive()
    assert run_array(queue, out, monkeypatch) == "pass-1"
    stats = step(out)
    assert stats["documents"] == stats["kept_documents"] + sum(rule["documents"] for rule in stats["rules"])
    made = {name: held for name, held in bytes_of(out).items() if not name.startswith(f"{LOGS}/")}
    assert made == bytes_of(tmp_path / "whole")

    jobs = list(queue.jobs().values())
    assert [(name, elements) for _, name, elements in arrays_of(queue)] == [("pass-0", 2), ("pass-0", 1), ("pass-1", 2)]
    first_array = next(words for words in jobs if any(word.startswith("--array") for word in words))
    assert {"--partition=long", "--account=web", "--array=0-1%5", "--cpus-per-task=1", "--requeue"} <= set(first_array)
    after = [word for words in jobs for word in words if word.startswith("--dependency")]
    assert after == [f"--dependency=afterany:{number}" for number in (4, 6, 8, 8)]


def test_what_fails_again_and_again_ends_the_build(
    source: Path, tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element of two is done, the other never: it is tried again twice, then its last words are told."""
    out = tmp_path / "out"
    settings = settings_of(source, out)
    build(settings, lambda progress: None)
    step(out)
    run_array(queue, out, monkeypatch, but=(0,))
    step(out)
    step(out)
    *_, (number, _, _) = arrays_of(queue)
    (out / LOGS / f"pass-0-{number}_0.log").write_text("started\nslurmstepd: error: Detected 1 oom-kill event\n")
    with pytest.raises(BadInput, match=r"2 tasks fail again and again, .*_0\.log \(slurmstepd: error: Detected"):
        step(out)
    assert build(settings, lambda progress: None) is None, "the same command goes on"
    assert step(out) is None


def test_refusals_of_slurm_are_told(
    source: Path, tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(queue.folder / "sbatch", "echo 'sbatch: error: invalid partition specified: none' >&2; exit 1")
    with pytest.raises(BadInput, match="sbatch: error: invalid partition specified: none"):
        build(settings_of(source, tmp_path / "out"), lambda progress: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="no sbatch here: call this on a login node"):
        build(settings_of(source, tmp_path / "out"), lambda progress: None)
