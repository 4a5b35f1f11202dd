"""Batch scripts and container definition, without Slurm or Apptainer: command lines, refusals, exit codes, %test."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import ROOT, environment, executable

TRAIN = ROOT / "cluster/exec/train_fabric.sh"
CHAIN = ROOT / "cluster/exec/submit_chain.sh"
CREATE = ROOT / "cluster/exec/create.sh"
BUILD = ROOT / "cluster/building/build-image.sh"
DEFINITION = ROOT / "cluster/building/llammlein.def"
PYTHON_COMMAND = ROOT / "cluster/exec/python_command.sh"
EXAMPLE = ROOT / "cluster/exec/env.example.sh"
SCRIPTS = sorted([*ROOT.glob("cluster/*/*.sh"), *ROOT.glob("tests/cluster/*.sh")])
PROGRAM = str(ROOT / "pretrain/tinyllama_fabric.py")


def bash(script: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script in a clean environment: a site's variables of whoever runs the tests must not show."""
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), **variables}
    return subprocess.run(["bash", script, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def without_engines(tmp_path: Path) -> str:
    """A PATH with what the scripts need, and no apptainer."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ["bash", "dirname", "basename", "git", "tar", "mktemp", "realpath", "rm", "mv", "sed", "cat"]:
        (folder / name).symlink_to(shutil.which(name) or "")
    return str(folder)


def site(tmp_path: Path, text: str = "") -> str:
    path = tmp_path / "env.sh"
    path.write_text(text)
    return str(path)


def dry_run(tmp_path: Path, *arguments: str, site_file: str = "", **variables: str) -> list[str]:
    """The srun command line that the script would run."""
    done = bash(TRAIN, *arguments, cwd=tmp_path, CLUSTER_ENV=site(tmp_path, site_file), DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_command_line_without_container(tmp_path: Path) -> None:
    line = dry_run(tmp_path, "--seed", "1", PYTHON="/opt/python", SLURM_CPUS_PER_TASK="6", TRAIN_DATA_DIR="/data/a b")
    assert line == [
        "srun", "--cpus-per-task=6", "--wait=120", "--kill-on-bad-exit=0",
        "/opt/python", PROGRAM, "--config", f"{ROOT}/pretrain/configs/LLaMmlein_1B.yaml",
        "--train_data_dir", "/data/a b", "--resume", "auto", "--seed", "1",
    ]  # fmt: skip


def test_arguments_win_over_the_site(tmp_path: Path) -> None:
    """A folder of the site beside one of the caller's would be a mixture of both."""
    site_file = "export TRAIN_DATA_DIR=/site/train VAL_DATA_DIR=/site/val MODEL_NAME=LLaMmlein_7B"
    line = dry_run(tmp_path, "--val_data_dir", "/my/val", "--train_data_dir=/my/train", site_file=site_file)
    assert line[line.index(PROGRAM) + 1 :] == [
        "--config", f"{ROOT}/pretrain/configs/LLaMmlein_7B.yaml", "--resume", "auto",
        "--val_data_dir", "/my/val", "--train_data_dir=/my/train",
    ]  # fmt: skip


def test_command_line_in_container(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    engine = executable(tmp_path / "bin" / "apptainer", "exit 1")
    line = dry_run(
        tmp_path, PATH=f"{engine.parent}:{os.environ['PATH']}",
        site_file=f"export CONTAINER_PATH={image} CONFIG=c.yaml VAL_DATA_DIR=v TOKENIZER_PATH=t CACHE_DIR=/local",
    )  # fmt: skip
    assert line[4:] == [
        str(engine), "exec", "--bind", str(ROOT), "--bind", str(tmp_path), "--nv", "--pwd", str(tmp_path), str(image),
        "python", PROGRAM, "--config", "c.yaml", "--val_data_dir", "v", "--tokenizer_path", "t",
        "--cache_dir", "/local", "--resume", "auto",
    ]  # fmt: skip


def test_a_container_sees_each_named_folder_once(tmp_path: Path) -> None:
    """Those of the site and the arguments, as far as they are there; not again those that the site binds itself."""
    image = tmp_path / "image.sif"
    image.touch()
    for name in ("de/train", "de/val", "en", "tokenizer", "site", "runs", "work"):
        (tmp_path / name).mkdir(parents=True)
    engine = executable(tmp_path / "bin" / "apptainer", "exit 1")
    done = bash(
        TRAIN, "--train_data_dir", f"[{tmp_path}/de/train,{tmp_path}/en:0.5]", f"--out_dir={tmp_path}/runs/new/1B",
        "--tokenizer_path", f"{tmp_path}/work/../tokenizer", "--learning_rate", "1e-3", "--val_data_dir", "/none/val",
        cwd=tmp_path / "work", CLUSTER_ENV=site(tmp_path, f"export TRAIN_DATA_DIR={tmp_path}/site"), DRY_RUN="1",
        PATH=f"{engine.parent}:{os.environ['PATH']}", CONTAINER_PATH=str(image),
        APPTAINER_BIND=f"/lustre:/scratch:ro,/x:{tmp_path}/tokenizer:ro,{tmp_path}/de/train",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = shlex.split(done.stdout)
    binds = [line[i + 1] for i, word in enumerate(line) if word == "--bind"]
    assert binds == [str(ROOT), str(tmp_path / "work"), str(tmp_path / "site"), str(tmp_path), str(tmp_path / "runs")]


def test_container_without_engine_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    path = without_engines(tmp_path)
    done = bash(TRAIN, cwd=tmp_path, PATH=path, CLUSTER_ENV=site(tmp_path), DRY_RUN="1", CONTAINER_PATH=str(image))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "train_fabric.sh: error: CONTAINER_PATH is set, but neither apptainer nor singularity is on this node's PATH"
    ]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CLUSTER_ENV": "/none/env.sh"}, "no site file /none/env.sh: copy cluster/exec/env.example.sh there"),
        ({"CONTAINER_PATH": "/none.sif"}, "no container CONTAINER_PATH=/none.sif"),
        ({}, "this is no Slurm job: start it by sbatch"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    done = bash(TRAIN, cwd=tmp_path, **{"CLUSTER_ENV": site(tmp_path), **variables})
    assert done.returncode == 2
    assert done.stderr.startswith(f"train_fabric.sh: error: {message}")
    assert done.stderr.count("\n") == 1


# What the batch script makes of srun's exit code. srun and scontrol are stand-ins; tests/cluster has the real ones.
@pytest.mark.parametrize(
    ("code", "expected", "requeued"),
    [(0, 0, False), (2, 2, False), (1, 1, False), (137, 137, False), (138, 138, False), (75, 75, True)],
)
def test_exit_codes(tmp_path: Path, code: int, expected: int, requeued: bool) -> None:
    executable(tmp_path / "bin" / "srun", f"exit {code}")
    executable(tmp_path / "bin" / "scontrol", f'echo "$@" > {tmp_path}/scontrol')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = bash(TRAIN, cwd=tmp_path, CLUSTER_ENV=site(tmp_path), SLURM_JOB_ID="77", PATH=path)
    assert done.returncode == expected, done.stderr
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 77\n"


def test_refused_requeue_is_told(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "srun", "exit 75")
    executable(tmp_path / "bin" / "scontrol", "exit 1")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = bash(TRAIN, cwd=tmp_path, CLUSTER_ENV=site(tmp_path), SLURM_JOB_ID="77", PATH=path)
    assert done.returncode == 75
    assert "error: Slurm refuses to requeue job 77: submit it again" in done.stderr


def test_an_older_slurm_is_asked_when_the_job_ends(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "srun", 'echo "ends ${SLURM_JOB_END_TIME:-unknown}"')
    variables = dict(
        CLUSTER_ENV=site(tmp_path), SLURM_JOB_ID="77", TZ="UTC", PATH=f"{tmp_path}/bin:{os.environ['PATH']}"
    )  # fmt: skip
    for answer, known in (("2026-01-02T03:04:05", 1767323045), ("N/A", "unknown"), ("", "unknown")):
        executable(tmp_path / "bin" / "squeue", f'[[ $* == *"--jobs=77 --format=%e" ]] && echo "{answer}"')
        assert bash(TRAIN, cwd=tmp_path, **variables).stdout == f"ends {known}\n"
    assert bash(TRAIN, cwd=tmp_path, SLURM_JOB_END_TIME="9", **variables).stdout == "ends 9\n"


def test_a_stalled_run_is_requeued_though_its_hung_rank_was_killed(tmp_path: Path) -> None:
    """srun tells 137, the highest code; the watchdog left its file. What an earlier start left does not count."""
    executable(tmp_path / "bin" / "scontrol", f'echo "$@" > {tmp_path}/scontrol')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    mark = tmp_path / ".requeue-77"
    for leave, expected in (('touch "$REQUEUE_FILE"', 75), ("true", 137)):
        executable(tmp_path / "bin" / "srun", f"{leave}; exit 137")
        mark.touch()
        done = bash(TRAIN, cwd=tmp_path, CLUSTER_ENV=site(tmp_path), SLURM_JOB_ID="77", PATH=path)
        assert done.returncode == expected, done.stderr
        assert ("the watchdog ended the run (137)" in done.stderr) == (expected == 75)
        assert (tmp_path / "scontrol").exists() == (expected == 75)
        assert not mark.exists()
        (tmp_path / "scontrol").unlink(missing_ok=True)


def test_a_chain_of_jobs(tmp_path: Path) -> None:
    """sbatch is a stand-in that counts; each link waits for the one before, and does not requeue itself."""
    counts = f'echo "$CHAIN_LINK $@" >> {tmp_path}/calls; echo "$((100 + $(wc -l < {tmp_path}/calls)));cluster"'
    executable(tmp_path / "bin" / "sbatch", counts)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = bash(CHAIN, "3", "--nodes=2", "--", "--max_steps", "5", cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"link {link} of 3: job {100 + link}" for link in (1, 2, 3)]
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"1 --parsable --no-requeue --nodes=2 {TRAIN} --max_steps 5",
        f"2 --parsable --no-requeue --dependency=afterany:101 --nodes=2 {TRAIN} --max_steps 5",
        f"3 --parsable --no-requeue --dependency=afterany:102 --nodes=2 {TRAIN} --max_steps 5",
    ]
    executable(tmp_path / "bin" / "srun", "exit 75")
    link = bash(TRAIN, cwd=tmp_path, CLUSTER_ENV=site(tmp_path), SLURM_JOB_ID="77", CHAIN_LINK="1", PATH=path)
    assert link.returncode == 75
    assert "the next link of the chain goes on" in link.stderr
    wrong = bash(CHAIN, "--nodes=2", cwd=tmp_path, PATH=path)
    assert wrong.returncode == 2
    assert wrong.stderr == "submit_chain.sh: error: the first argument is the number of jobs, not '--nodes=2'\n"


def test_jobs_get_ports_of_their_own(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "srun", 'echo "$MASTER_PORT $OMP_NUM_THREADS"')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    seen = [
        bash(
            TRAIN, cwd=tmp_path, CLUSTER_ENV=site(tmp_path), PATH=path, SLURM_JOB_ID=job, SLURM_CPUS_PER_TASK="6"
        ).stdout.split()
        for job in ("7", "8", "20007")
    ]
    assert seen == [["10007", "6"], ["10008", "6"], ["10007", "6"]]


def test_create_hands_its_arguments_and_the_sites_values_over(tmp_path: Path) -> None:
    """As in a job: Slurm runs a copy of the script from elsewhere, and the project is where sbatch was called."""
    spooled = tmp_path / "spool" / "a" / "b" / "slurm_script"
    spooled.parent.mkdir(parents=True)
    shutil.copy(CREATE, spooled)
    done = bash(
        spooled, str(tmp_path / "iter-00000001-ckpt.pth"), cwd=tmp_path, CLUSTER_ENV=site(tmp_path, "echo sourced"),
        SLURM_SUBMIT_DIR=str(ROOT),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == "sourced\n"
    assert done.stderr == f"create.sh: error: no checkpoint {tmp_path}/iter-00000001-ckpt.pth\n"


def test_example_sets_nothing_but_its_open_lines_and_names_known_variables(tmp_path: Path) -> None:
    """Every variable that the scripts read from the site is explained, and its commented lines are valid shell."""
    every_line = re.sub(r"^# (?=export )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    names = re.findall(r"^export (\w+)=", every_line, re.MULTILINE)
    listed = 'for name in "$@"; do echo "$name=${!name-}"; done'
    script = tmp_path / "all.sh"
    script.write_text(f"set -eu\n{every_line}\n{listed}")
    done = bash(script, *names, cwd=tmp_path, USER="someone", CONFIG="mine.yaml")
    assert done.returncode == 0, done.stderr
    values = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert values["CONFIG"] == "mine.yaml"
    assert values["NCCL_IB_HCA"] == "=mlx5_0,mlx5_1,mlx5_2,mlx5_3"
    assert values["NCCL_DEBUG"] == "WARN"
    read = {"CONTAINER_PATH", "PYTHON", "CONFIG", "TRAIN_DATA_DIR", "VAL_DATA_DIR", "TOKENIZER_PATH", "CACHE_DIR"}
    assert read <= set(re.findall(r"\$\{(\w+):", TRAIN.read_text() + PYTHON_COMMAND.read_text()))
    assert read <= set(names)


def test_build_says_what_is_missing(tmp_path: Path) -> None:
    path = without_engines(tmp_path)
    done = bash(BUILD, cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert done.stderr.startswith("build-image.sh: error: neither apptainer nor singularity is on PATH")
    executable(tmp_path / "bin" / "apptainer", "exit 1")
    done = bash(BUILD, cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert done.stderr.startswith("build-image.sh: error: TORCH_INDEX_URL is not set")


def test_build_sees_the_commit_and_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    """The engine is a stand-in: it lists the folder that it was called in and writes an image, or fails."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    (tmp_path / "tmp").mkdir()
    listing = 'stat -c "mode %a" .; ls -A; cat COMMIT; echo "$@"'
    engine = executable(tmp_path / "bin/apptainer", listing + '; [[ -z $FAIL ]] || exit 9; touch "${@: -2:1}"')
    variables = dict(
        PATH=f"{engine.parent}:{os.environ['PATH']}", TMPDIR=str(tmp_path / "tmp"), TORCH_INDEX_URL="https://index",
        BUILD_FLAGS="--fakeroot", TORCH_VERSION="2.12.0",
    )  # fmt: skip
    failed = bash(BUILD, "a.sif", cwd=tmp_path, FAIL="1", **variables)
    assert failed.returncode == 9
    built = bash(BUILD, "a.sif", cwd=tmp_path, FAIL="", **variables)
    assert built.returncode == 0, built.stderr
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert commit.stdout.strip() in built.stdout.splitlines()
    assert "mode 755" in built.stdout.splitlines(), "others could not read the image's copy"
    assert {"lit_gpt", "requirements.txt", "COMMIT"} <= set(built.stdout.splitlines())
    assert not {".venv", ".git", "out"} & set(built.stdout.splitlines())
    assert (
        "build --fakeroot --build-arg TORCH_INDEX_URL=https://index --build-arg TORCH_VERSION=2.12.0 "
        f"{tmp_path}/a.sif.partial cluster/building/llammlein.def" in built.stdout
    )
    assert (tmp_path / "a.sif").exists()
    assert not [*tmp_path.glob("*.partial"), *(tmp_path / "tmp").iterdir()]
    assert bash(BUILD, "a.sif", cwd=tmp_path, **variables).returncode == 2


def sections() -> dict[str, str]:
    parts = re.split(r"^%(\w+)\n", DEFINITION.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)) | {"header": parts[0]}


def test_definition_pins_and_declares_what_it_uses() -> None:
    parts = sections()
    assert re.search(r"^From: \S+:13\.\d+\.\d+-\S+$", parts["header"], re.MULTILINE)
    assert set(re.findall(r"{{ (\w+) }}", parts["post"])) == set(re.findall(r"^    (\w+)=", parts["arguments"], re.M))
    assert "FLASH_ATTN_4_VERSION=4.0.0b36" in parts["arguments"]
    assert "git clone" not in parts["post"]
    assert "://" not in DEFINITION.read_text(), "an address of a package index"
    bounds = re.search(r"^torch>=(\d+)\.(\d+),<(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    pinned = re.search(r"TORCH_VERSION=(\d+)\.(\d+)", parts["arguments"])
    assert bounds
    assert pinned
    low, high = [tuple(map(int, pair)) for pair in (bounds.groups()[:2], bounds.groups()[2:])]
    assert low <= tuple(map(int, pinned.groups())) < high


@pytest.mark.slow
def test_the_images_own_test_runs_on_this_checkout(tmp_path: Path) -> None:
    """Its shell, in the place of the image; the kernels are there by name only, as nothing here may need a GPU."""
    for name, version in (("flash_attn_3", "3.0.0"), ("flash_attn_4", "4.0.0b36"), ("quack_kernels", "0.6.5")):
        folder = tmp_path / "packages" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    env = environment(
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}", PYTHONPATH=str(tmp_path / "packages"), LLAMMLEIN_SOURCE=str(ROOT),
        TMPDIR=str(tmp_path / "tmp"),
    )  # fmt: skip
    run = ["sh", "-c", sections()["test"]]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "flash-attn-4 4.0.0b36" in done.stdout
    assert "finished at step 10" in done.stderr
    assert not list((tmp_path / "tmp").glob("tmp.*"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, "-x", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
