"""How many cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_gpt.prepare import worker_pool


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """64 cores, and no limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(worker_pool, "_cgroup_cores", lambda *_: iter(()))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    return monkeypatch


def test_the_smallest_limit_counts(machine: pytest.MonkeyPatch) -> None:
    assert worker_pool.usable_cores() == 64
    machine.setenv("SLURM_CPUS_PER_TASK", "16")
    assert worker_pool.usable_cores() == 16
    machine.setattr(worker_pool, "_cgroup_cores", lambda *_: iter([40, 8]))
    assert worker_pool.usable_cores() == 8
    machine.setattr(os, "sched_getaffinity", lambda _: {3, 7})
    assert worker_pool.usable_cores() == 2
    machine.setenv("SLURM_CPUS_PER_TASK", "")
    assert worker_pool.usable_cores() == 2
    machine.setenv("SLURM_CPUS_PER_TASK", "0")
    assert worker_pool.usable_cores() == 1


def test_affinity_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert worker_pool.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


CASES = {
    "v2, limited above": ("0::/job/step\n", {"cpu.max": "max 100000", "job/cpu.max": "250000 100000"}, [3]),
    "v2, twice": ("0::/job/step\n", {"job/cpu.max": "800000 100000", "job/step/cpu.max": "50000 100000"}, [1, 8]),
    "v2, a container's root": ("0::/\n", {"cpu.max": "200000 100000"}, [2]),
    "v2, no limit": ("0::/job\n", {"job/cpu.max": "max 100000"}, []),
    "v1": (
        "5:memory:/job\n4:cpu,cpuacct:/job\n",
        {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"},
        [4],
    ),
    "v1, no limit": (
        "4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, []
    ),
    "no such folder": ("0::/elsewhere\n", {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_quotas_of_cgroups(tmp_path: Path, name: str) -> None:
    membership, limits, expected = CASES[name]
    write(tmp_path / "membership", membership)
    for path, content in limits.items():
        write(tmp_path / "cgroup" / path, content + "\n")
    assert list(worker_pool._cgroup_cores(tmp_path / "membership", tmp_path / "cgroup")) == expected


def test_no_linux(tmp_path: Path) -> None:
    assert list(worker_pool._cgroup_cores(tmp_path / "absent", tmp_path)) == []
