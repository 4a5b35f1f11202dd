"""The node check: on this machine's CPU with one and two processes, and how it judges measurements."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.launch.node_check import GpuState, Measured, judge, measure_disk, parse_gpu
from tests.support.programs import ROOT, environment

GOOD = Measured(
    rank_name="rank 0 on n1", host="n1", gpu="H100, 80 GiB", gpu_state=GpuState(0, []), matmul_flops=700e12,
    all_reduce_bytes_per_s=2e11, write_bytes_per_s=1e9, free_bytes=10**12, clock_offset_s=0.0, file_clock_offset_s=0.01,
    versions={"torch": "2.13.0"},
)  # fmt: skip
PEER = GOOD._replace(rank_name="rank 1 on n2", host="n2", clock_offset_s=0.02, write_bytes_per_s=None)


def check(run_dir: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/check_node.py", "--run_dir", run_dir, "--write_mb", 1, *flags]
    return subprocess.run(
        [str(part) for part in command], env=environment(), capture_output=True, text=True, timeout=240
    )


@pytest.mark.distributed
def test_two_processes_on_cpus(tmp_path: Path) -> None:
    done = check(tmp_path / "run", "--accelerator", "cpu", "--devices", 2, "--model_name", "debug")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 1 nodes" in done.stdout
    assert "not checked: no GPU is visible" in done.stdout
    assert "GB/s a link" in done.stdout
    assert "MB/s, fsync included" in done.stdout
    assert "BAD" not in done.stdout
    assert list((tmp_path / "run").iterdir()) == [], "the test file is gone"


@pytest.mark.slow
def test_one_process_without_space_is_exit_code_1(tmp_path: Path) -> None:
    done = check(tmp_path, "--accelerator", "cpu", "--model_name", "LLaMmlein_7B", "--checkpoints", 1_000_000)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "BAD" in line]
    assert "space for checkpoints" in line
    assert "80867278.8 GB needed" in line  # 6,738,939,904 weights x 12 bytes x 1,000,000
    assert done.stdout.count("not checked: one process") == 2  # all-reduce, clocks


def test_a_mistake_is_exit_code_2(tmp_path: Path) -> None:
    done = check(tmp_path, "--model_name", "none")
    assert done.returncode == 2
    assert "LLaMmlein_7B" in done.stderr


@pytest.mark.parametrize(
    ("changed", "bad"),
    [
        ({}, []),
        ({"matmul_flops": 560e12}, ["rank 1 on n2"]),  # 89% of the median of 700 and 560, 630
        ({"gpu_state": GpuState(1, [])}, ["rank 1 on n2"]),
        ({"gpu_state": GpuState(0, ["hardware thermal slowdown"])}, ["rank 1 on n2"]),
        ({"gpu_state": None}, []),
        ({"clock_offset_s": -3.0}, ["clocks against rank 0"]),
        ({"free_bytes": 10**9}, ["space for checkpoints"]),
        ({"versions": {"torch": "2.12.0"}}, ["torch"]),
        ({"versions": {"torch": "does not load: x"}}, ["torch"]),
        ({"write_bytes_per_s": 1e6, "file_clock_offset_s": 40.0}, ["clock of the run folder, from n2"]),
    ],
)
def test_what_is_bad(changed: dict[str, object], bad: list[str]) -> None:
    findings = judge([GOOD, PEER._replace(**changed)], needed_bytes=10**10)
    assert [finding.what for finding in findings if finding.ok is False] == bad


def test_gpu_states() -> None:
    assert parse_gpu("0, 0x0000000000000004\n") == GpuState(0, [])  # held at the power cap: usual under load
    assert parse_gpu("3, 0x0000000000000048\n") == GpuState(3, ["hardware slowdown", "hardware thermal slowdown"])
    assert parse_gpu("[N/A], 0x0000000000000000\n") == GpuState(0, [])


def test_disk(tmp_path: Path) -> None:
    rate, offset_s = measure_disk(tmp_path, 1 << 20)
    assert rate > 0
    assert abs(offset_s) < 1
    assert list(tmp_path.iterdir()) == []
