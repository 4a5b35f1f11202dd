"""The container on a real Slurm: the batch script with CONTAINER_PATH, and the line that a user types.

Apptainer and a small image come from install_apptainer.sh; where there can be none, the tests skip and say why. Data
and run folder lie where Apptainer shows nothing by itself: neither at home nor in /tmp.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import ROOT, environment
from tests.support.slurm import CANNOT, submit
from tests.support.training import command, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

INSTALL = ROOT / "tests/cluster/install_apptainer.sh"
SHOWN = (Path.home(), Path("/tmp"), Path("/var/tmp"))
"""What Apptainer shows of the host in every container, beside the current folder."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "small.sif"
    done = subprocess.run(
        ["bash", INSTALL, path, sys.prefix], env=environment(), capture_output=True, text=True, timeout=400
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder that no container shows by itself."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="llammlein-", dir="/srv"))
    except OSError as error:
        pytest.skip(f"no folder outside /tmp and home: {error}")
    yield folder
    shutil.rmtree(folder)


def site_file(image: Path, *binds: Path, **values: object) -> str:
    """A site's values. Of this machine's Python, which is not in the image, it binds what a container does not show."""
    python = [Path(sys.prefix).resolve(), Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib")).resolve()]
    hidden = [path for path in python if not any(path.is_relative_to(shown) for shown in SHOWN)]
    values = dict(CONTAINER_PATH=image, APPTAINER_BIND=",".join(map(str, [*binds, *hidden])), **values)
    return "".join(f"export {name}='{value}'\n" for name, value in values.items())


@pytest.fixture
def data(german_run: Path, elsewhere: Path) -> Path:
    """train/, val/ and tokenizer/ in a folder that no container shows by itself."""
    shutil.copytree(german_run.parent / "data", elsewhere / "data")
    shutil.copytree(german_run.parent / "tokenizer", elsewhere / "data" / "tokenizer")
    return elsewhere / "data"


def test_a_container_trains_stops_goes_on_and_exports(slurm: Path, image: Path, data: Path, elsewhere: Path) -> None:
    """USR1 in the middle; then the export of the last checkpoint in the image. Nothing is bound twice."""
    site = site_file(image, CONFIG=ROOT / "pretrain/configs/debug.yaml")
    job = submit(slurm, data, elsewhere, site=site, tokenizer_path=data / "tokenizer", max_steps=30)
    job.wait(lambda: job.steps_logged() >= 10)
    job.cancel("--signal=USR1")
    job.wait_for_text("start 2,")
    job.wait_for_state("COMPLETED", "FAILED")
    log = job.text()
    assert job.fact("ExitCode") == "0:0", log
    assert "(75): back into the queue" in log
    assert f"resumed from {job.out_dir}/iter-" in log
    assert [int(line["step"]) for line in metrics(job.out_dir)] == list(range(1, 31))
    assert "already in the mount point list" not in log

    export = ["bash", str(ROOT / "cluster/exec/create.sh"), str(job.out_dir / "iter-00000030-ckpt.pth")]
    destination = elsewhere / "models" / "german"
    done = subprocess.run(
        [*export, str(destination)], cwd=ROOT, env=job.environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "already in the mount point list" not in done.stderr
    assert json.loads((destination / "config.json").read_text())["model_type"] == "llama"


def test_the_line_that_a_user_types(slurm: Path, image: Path, data: Path, elsewhere: Path, tmp_path: Path) -> None:
    """With the site file sourced; the program says of a folder that the container does not show how to bind it."""
    program, *arguments = command(data, elsewhere / "run", train_data_dir=None, val_data_dir=None, max_steps=4)[1:]
    assert program == str(ROOT / "pretrain/tinyllama_fabric.py")
    line = f"srun --ntasks-per-node=1 --nodes=1 apptainer exec {image} python pretrain/tinyllama_fabric.py"
    for binds in ([elsewhere], []):
        values = dict(TRAIN_DATA_DIR=data / "train", VAL_DATA_DIR=data / "val", TOKENIZER_PATH=data / "tokenizer")
        site = tmp_path / "env.sh"
        site.write_text(site_file(image, ROOT, *binds, **values))
        done = subprocess.run(
            ["bash", "-c", f'source "$0"; {line} "$@"', site, *arguments], cwd=ROOT,
            env=environment(SLURM_CONF=str(slurm)), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if binds:
            assert done.returncode == 0, done.stderr
            assert "finished at step 4" in done.stderr
            assert (elsewhere / "run" / "iter-00000004-ckpt.pth").is_dir()
        else:
            assert done.returncode == 2, done.stderr
            assert f"{data}/train: there is no such folder in this container: name it in APPTAINER_BIND" in done.stderr
