"""Weights & Biases down, without DNS, refusing or offline (fault case 23); keys in the environment (case 24)."""

from __future__ import annotations

import csv
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from tests.support.programs import environment, run_program
from tests.support.training import SECRETS, assert_no_secret, command, make_store, metrics, train

internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")


@pytest.fixture(scope="module")
def plain(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has nothing to do with Weights & Biases."""
    out = tmp_path_factory.mktemp("plain")
    train(store, out)
    return out


class Refuses(BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "user is not logged in"}]}')

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["down", "no DNS", "wrong key"])
def test_training_does_not_depend_on_the_server(
    store: Path, plain: Path, tmp_path: Path, refusing_server: str, fault: str
) -> None:
    url = {"down": closed_port(), "no DNS": "http://no-such-host.invalid"}.get(fault, refusing_server)
    home = tmp_path / "home"  # a key in the home folder of whoever runs the tests must not count
    home.mkdir()
    done = run_program(
        command(store, tmp_path / "run", wandb="online", wandb_timeout_s=3, tensorboard="true"),
        env=environment(WANDB_BASE_URL=url, HOME=str(home), **SECRETS), fresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if " WARNING " in line]
    assert len(warnings) == 1, done.stderr
    assert "--wandb online: " in warnings[0]
    assert "going on offline, in " in warnings[0]
    assert metrics(tmp_path / "run") == metrics(plain)
    assert [step for step, _ in offline_series(tmp_path / "run")] == list(range(1, 13))
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    assert_no_secret(tmp_path / "run", done.stdout, done.stderr)


def offline_series(run_dir: Path, run_id: str = "*") -> list[tuple[int, float]]:
    """(step, loss) of every line in the files that `wandb sync` uploads to the run, in the order of the starts."""
    series = []
    for file in sorted(run_dir.glob(f"wandb/offline-run-*/run-{run_id}.wandb")):
        for data in transaction_log(file.read_bytes()):
            record = internal.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                series.append((items["_step"], items["loss"]))
    return series


def transaction_log(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, kind) after 7 bytes of header."""
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if kind == 0:
            return
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_offline_is_one_series_over_a_requeue_and_a_kill(store: Path, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL beyond a checkpoint, then to the end: no step twice, none of a clean stop lost."""
    settings = dict(
        wandb="offline", wandb_name="a name", resume="auto", max_epochs=1000, max_steps=80, save_interval_steps=10,
        eval_interval_steps=1000,
    )  # fmt: skip
    parts = []
    for number, until in ((signal.SIGTERM, 5), (signal.SIGKILL, 35)):
        process = subprocess.Popen(command(store, tmp_path, **settings), env=environment(), stderr=subprocess.DEVNULL)
        while not (tmp_path / "metrics.csv").exists() or len(metrics(tmp_path)) < until:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        process.wait()
        parts.append(int(metrics(tmp_path)[-1]["step"]))
    time.sleep(1)  # the package's own process ends when it sees that ours is gone
    train(store, tmp_path, **settings)
    losses = {int(line["step"]): float(line["loss"]) for line in metrics(tmp_path)}
    assert list(losses) == list(range(1, 81))
    series = offline_series(tmp_path)
    steps = [step for step, _ in series]
    assert steps == sorted(set(steps)), "a step twice"
    lost = set(losses) - set(steps)
    assert all(parts[0] < step <= parts[1] for step in lost), "only what SIGKILL caught in flight may be missing"
    assert all(loss == pytest.approx(losses[step]) for step, loss in series)
    assert len({path.name.split("-")[-1] for path in tmp_path.glob("wandb/offline-run-*")}) == 1, "one id in all starts"


@pytest.mark.slow
def test_a_crash_names_the_rank_and_leaks_no_key(tmp_path: Path) -> None:
    """Shards with ids that no vocabulary has; the last line of the log says which rank on which host, and why."""
    store = make_store(tmp_path / "store")
    for shard in (store / "train").glob("*.tokens"):
        data = bytearray(shard.read_bytes())
        data[-3000:-2000] = b"\xff" * 1000
        shard.write_bytes(data)
    done = run_program(
        command(store, tmp_path / "run", eval_interval_steps=1000, wandb="offline"), env=environment(**SECRETS)
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"rank 0 on {socket.gethostname()} failed at step " in last
    assert "Traceback" in done.stderr
    assert_no_secret(tmp_path / "run", done.stdout, done.stderr)
    assert "wandb" in yaml.safe_load((tmp_path / "run/settings.yaml").read_text())
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        assert next(csv.reader(file))[0] == "step"
