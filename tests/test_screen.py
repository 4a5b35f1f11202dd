"""What a person sees beside results: no line that libraries print at every start, and the next command to type."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lit_gpt import cli
from lit_gpt.checkpoint.record import DamagedCheckpoint, described
from lit_gpt.cli import BadInput, Parser, checkout_path, command_line
from lit_gpt.export.exported_folder import require_exported
from lit_gpt.launch.site import RANKS, is_first_process
from lit_gpt.noise import silence
from lit_gpt.settings_reader import parse_settings
from lit_gpt.train.settings import Settings
from scripts import prepare_data, train_tokenizer
from tests.support.programs import environment

ROOT = Path(__file__).resolve().parents[1]
TORCHAO = "Failed to load /x/torchao/_C_mxfp8.so: Could not load this library: /x/torchao/_C_mxfp8.so"
AUX_DATA = (
    "Argument aux_data (position 19) cannot be converted to a JitArgument for function 'f'. Its type is not supported."
)
SRUN = "The `srun` command is available on your system but is not used. HINT: If your intention is ..."


@pytest.mark.parametrize(
    ("logger", "message", "shown"),
    [
        ("torchao", TORCHAO, False),
        ("torchao", "Failed to load the weights", True),
        ("torchao.float8", TORCHAO, True),
        ("torchao.kernel.intmm", "Warning: Detected no triton, on systems without Triton ...", False),
        ("torch.utils._pytree", "<enum 'A'> is an Enum subclass and is now natively supported by torch.compile", False),
        ("torch.utils._pytree", "<class 'A'> is already registered", True),
        ("gguf.gguf_writer", "/x/.model.gguf.partial: n_tensors = 39, total_size = 3.6M", False),
        ("gguf.gguf_writer", "Duplicated key name 'a'", True),
    ],
)
def test_a_logged_line_is_silenced_by_its_text_and_logger(
    caplog: pytest.LogCaptureFixture, logger: str, message: str, shown: bool
) -> None:
    silence()
    silence()
    with caplog.at_level(logging.WARNING):
        logging.getLogger(logger).propagate = True
        logging.getLogger(logger).warning("%s", message)
    assert [record.getMessage() for record in caplog.records] == [message] * shown


@pytest.mark.parametrize(
    ("module", "message", "shown"),
    [
        ("cutlass.base_dsl.dsl", AUX_DATA, False),
        ("cutlass.base_dsl.dsl", AUX_DATA.replace("aux_data", "mQ"), True),
        ("somebody.else", AUX_DATA, True),
        ("lightning.fabric.plugins.environments.slurm", SRUN, False),
        ("lightning.fabric.plugins.environments.slurm", "srun is broken", True),
    ],
)
def test_a_warning_is_silenced_by_its_text_and_module(module: str, message: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        silence()
        warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in seen] == [message] * shown


def test_a_path_flag_of_type_str_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPUS", "/data/german")
    monkeypatch.setenv("HOME", "/home/ada")
    parser = Parser(None)
    parser.add_argument("--source", type="path", nargs="+")
    assert parser.parse_args(["--source", "~/a b", "$CORPUS/x", "${CORPUS}"]).source == [
        "/home/ada/a b", "/data/german/x", "/data/german",
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"names \$NOPE, which is not set in the environment"):
        parser.parse_args(["--source", "$NOPE/x"])


def test_descriptions_are_filled_to_the_terminal_and_commands_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "32")  # argparse leaves two columns
    text = "Ask what a run saw, and\nwhen it was.\n\n    python x.py --a long --command here\n\n- one\n- two\n"
    assert Parser(text, prog="x").format_help().split("\n\n")[1:4] == [
        "Ask what a run saw, and when\nit was.", "    python x.py --a long --command here", "- one\n- two",
    ]  # fmt: skip


def test_a_folder_that_is_no_exported_model_is_answered_with_the_way_to_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts/generate.py")])
    newest = Path("run/iter-00000020-ckpt.pth")
    for name in ("run/iter-00000003-ckpt.pth", newest, "run/iter-x", "empty"):
        Path(name).mkdir(parents=True)
    (newest / "MANIFEST.json").touch()
    export = f"bash {ROOT}/scripts/create.sh {newest} exports"
    told = {
        "run": f"a run folder, not an exported model: {export} its newest checkpoint",
        str(newest): f"a checkpoint, not an exported model: {export} it",
        "empty": "holds no config.json; give a folder that create.sh wrote",
        "absent": "there is no such folder; give one that create.sh wrote",
    }
    for folder, why in told.items():
        with pytest.raises(BadInput) as caught:
            require_exported(Path(folder))
        assert str(caught.value) == f"--model {folder}: {why}"
    with pytest.raises(DamagedCheckpoint, match=f"run is a run folder, not a checkpoint; its newest is {newest}"):
        described(Path("run"))


@pytest.mark.parametrize(
    ("folder", "called", "expected"),
    [
        (ROOT, "scripts/prepare_data.py", "scripts/create.sh"),
        (ROOT / "scripts", "prepare_data.py", "create.sh"),
        (ROOT.parent, f"{ROOT.name}/scripts/generate.py", f"{ROOT.name}/scripts/create.sh"),
        (
            Path("/usr/share"),
            str(ROOT / "scripts/generate.py"),
            f"{ROOT}/scripts/create.sh",
        ),
        (ROOT, "/usr/bin/pytest", "scripts/create.sh"),
    ],
)
def test_commands_are_seen_from_where_the_user_is(
    monkeypatch: pytest.MonkeyPatch, folder: Path, called: str, expected: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [called])
    assert checkout_path("scripts/create.sh") == expected
    assert command_line("scripts/create.sh", Path("a b"), "--x") == f"bash {expected} 'a b' --x"


def test_a_link_to_the_checkout_is_followed_as_it_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "code").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["code/scripts/train_tokenizer.py"])
    assert command_line("scripts/prepare_data.py") == "python code/scripts/prepare_data.py"


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "5"}, False),
        ({"RANK": "0", "SLURM_PROCID": "5"}, True),  # torchrun, started by srun on the second node of another rank
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
    ],
)
def test_one_process_speaks_before_the_ranks_know_each_other(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], first: bool
) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first


LOADS_TORCH = [
    ("pretrain/tinyllama_fabric.py --model_name debug --train_data_dir .", "model debug: loading PyTorch"),
    ("scripts/average.py --run_dir r", "r: loading PyTorch"),
    ("scripts/benchmark_attention.py", "attention: loading PyTorch"),
    ("scripts/benchmark_checkpoint.py --model_name debug", "model debug: loading PyTorch"),
    ("scripts/benchmark_data.py", "data path: loading PyTorch"),
    ("scripts/benchmark_litgpt.py --size debug", "model debug: loading PyTorch"),
    ("scripts/benchmark_loss.py", "loss: loading PyTorch"),
    ("scripts/benchmark_step.py --size debug", "model debug: loading PyTorch"),
    ("scripts/check_node.py --run_dir r", "run folder r: loading PyTorch"),
    ("scripts/convert_gguf.py --model . --destination_path x.gguf", ".: loading PyTorch"),
    ("scripts/convert_hf_checkpoint.py --checkpoint_dir . --destination_path x", ".: loading PyTorch and transformers"),
    ("scripts/convert_hf_checkpoint.py --checkpoint_dir torch.py --destination_path x", "torch.py: loading PyTorch"),
    ("scripts/convert_lit_checkpoint.py --checkpoint c --destination_path x", "c: loading PyTorch and transformers"),
    ("scripts/evaluate.py --model . --tasks x", ".: loading PyTorch"),
    ("scripts/generate.py --model . --prompt x", ".: loading PyTorch and transformers"),
]


def test_every_program_that_says_so_or_imports_torch_is_in_the_list() -> None:
    """But for the demo, which loads PyTorch as its last stage, and names that."""
    loads = re.compile(r"say_loading\(|^ +(import|from) (torch|transformers)\b", re.MULTILINE)
    programs = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "pretrain").glob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in programs if loads.search(path.read_text())}
    assert found - {"scripts/demo.py"} == {command.split()[0] for command, _ in LOADS_TORCH}


@pytest.mark.parametrize(("command", "last_line"), LOADS_TORCH)
def test_a_program_says_what_it_does_before_it_loads_torch(tmp_path: Path, command: str, last_line: str) -> None:
    """torch and transformers are modules here that end the program: the line must stand before that."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    for name in ("config.json", "litgpt.py"):
        (tmp_path / name).touch()
    program, *arguments = command.split()
    line = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {line}",
         str(ROOT / program), *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environment(PYTHONPATH=str(tmp_path)),
    )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert done.stderr.endswith(f"INFO {last_line}\n")


@pytest.mark.slow
def test_each_stage_names_the_command_of_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command is run as it was printed, up to the training's, whose settings are read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts/train_tokenizer.py")])
    caplog.set_level(logging.INFO)
    lines = [json.dumps({"id": str(n), "inhalt": f"Der Satz Nummer {n} steht hier. " * 9}) for n in range(60)]
    (tmp_path / "my text.jsonl").write_text("\n".join(lines))
    words = ["--source", "my text.jsonl", "--destination_path", "out/tok", "--vocab_size", "300"]
    train_tokenizer.main([*words, "--text_field", "inhalt"])
    prepare = next_words(caplog)
    assert prepare == [
        "python", checkout_path("scripts/prepare_data.py"), "--source", "my text.jsonl", "--tokenizer_path", "out/tok",
        "--destination_path", "out/data", "--text_field", "inhalt",
    ]  # fmt: skip
    prepare_data.main([*prepare[2:], "--workers", "1", "--val_fraction", "0.3"])
    training = next_words(caplog)
    assert training[:2] == ["python", checkout_path("pretrain/tinyllama_fabric.py")]
    settings, files = parse_settings(Settings, training[2:], None)
    settings.check()
    assert (settings.train_data_dir, settings.val_data_dir) == ("out/data/train", "out/data/val")
    assert (settings.tokenizer_path, files[0].resolve()) == ("out/tok", ROOT / "pretrain/configs/debug.yaml")


def next_words(caplog: pytest.LogCaptureFixture) -> list[str]:
    line = caplog.records[-1].getMessage()
    assert line.startswith("next: ")
    return shlex.split(line.removeprefix("next: "))


def test_run_program_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(cli, "silence", lambda: calls.append(1))
    with pytest.raises(SystemExit):
        cli.run_program(lambda: 0)
    assert calls == [1]
