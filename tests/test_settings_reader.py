"""Where settings come from, which source wins, and how a mistake names its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_gpt.cli import BadInput
from lit_gpt.launch.site import site_settings
from lit_gpt.settings_reader import Given, parse_settings
from lit_gpt.train.settings import COMMON, Settings
from tests.support.programs import ROOT

RECIPES = sorted((ROOT / "pretrain/configs").glob("[!c]*.yaml"))  # a corpus has a program of its own


def parse(*argv: str, **options: Any) -> Settings:
    return parse_settings(Settings, argv, "", common=COMMON, recipes=RECIPES, **options)[0]


def yaml_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_means_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML 1.1 would read off as False, 1e-3 as text, 010 as 8 and 1:30 as 90."""
    monkeypatch.setenv("HOME", "/home/me")
    text = """
        wandb: off
        learning_rate: 1e-3
        min_lr: 0
        max_steps: 1e5
        warmup_steps: 010
        compile: no
        wandb_name: 1:30
        wandb_project: yes
        out_dir: ~/runs/$HOME
        val_data_dir: ~
        cache_dir:
        spike_policy: off
        train_data_dir: [~/a:1, "~/b:2"]
        sample_prompts:
          - ja
          - "1"
    """
    settings = parse("--config", yaml_file(tmp_path, text))
    expected: dict[str, Any] = dict(
        wandb="off", learning_rate=0.001, min_lr=0.0, max_steps=100_000, warmup_steps=10, compile=False,
        wandb_name="1:30", wandb_project="yes", out_dir="/home/me/runs//home/me", val_data_dir=None, cache_dir=None,
        spike_policy="none", train_data_dir=["/home/me/a:1", "/home/me/b:2"], sample_prompts=["ja", "1"],
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.beta1 == 0.9, "what the file does not name keeps its default"


def test_settings_survive_their_own_dump(tmp_path: Path) -> None:
    """settings.yaml of a run, read again, is the same settings, whatever the words in it look like to YAML."""
    odd = Settings(
        wandb_name="null", wandb_project="off", wandb="offline", out_dir="1e3", train_data_dir=["a", "b:2"],
        sample_prompts=["", "no", "~", "Würzburg: 1"], time_limit_s=float("inf"), learning_rate=1e-10, compile=False,
    )  # fmt: skip
    read = parse("--config", yaml_file(tmp_path, yaml.safe_dump(dataclasses.asdict(odd))))
    assert dataclasses.replace(read, wandb_name="null") == odd
    assert read.wandb_name is None, "the one word that cannot be a name"


def test_flags_win_over_files_and_files_over_the_environment(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "max_steps: 7\nseed: 7\n")
    site = {name: Given("5", f"${name.upper()}") for name in ("max_steps", "seed", "devices")}
    settings = parse("--seed", "9", "--config", file, environment=site)
    assert (settings.seed, settings.max_steps, settings.devices, settings.num_nodes) == (9, 7, 5, 1)
    more = tmp_path / "more.yaml"
    more.write_text("max_steps: 8\n")
    assert parse("--config", file, "--config", str(more)).max_steps == 8, "the later file wins"
    assert parse("--seed", "1", "--seed=2").seed == 2
    assert parse("--plan", "--compile", "false", "--deterministic").plan is True


def test_lists(tmp_path: Path) -> None:
    assert parse("--train_data_dir", "a").train_data_dir == "a"
    assert parse("--train_data_dir", "a", "--train_data_dir", "b:2").train_data_dir == ["a", "b:2"]
    assert parse("--train_data_dir", "a", "b").train_data_dir == ["a", "b"]
    assert parse("--train_data_dir", "[a, 'b:2']").train_data_dir == ["a", "b:2"]
    assert parse("--sample_prompts", "Am Morgen").sample_prompts == ["Am Morgen"]
    file = yaml_file(tmp_path, "train_data_dir: [x, y]")
    assert parse("--config", file, "--train_data_dir", "a").train_data_dir == "a", "a flag replaces the file's list"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "1e-3"], "no flag --lr; did you mean --learning_rate?"),
        (["--max_step", "3"], "no flag --max_step; did you mean --max_steps?"),
        (["--learning", "3"], "no flag --learning; did you mean --learning_rate?"),
        (["--max_steps"], "--max_steps: expects a value"),
        (["--max_steps", "many"], "--max_steps many: must be a whole number, such as 1000, 1_000 or 1e3"),
        (["--max_steps", ""], "--max_steps '': must be a whole number"),
        (
            ["--precision", "bf16"],
            "--precision bf16: must be one of 32-true, bf16-mixed, bf16-true; did you mean",
        ),
        (["run.yaml"], "run.yaml: the value of no flag; did you mean --config run.yaml?"),
        (["--seed", "1", "2"], "2: the value of no flag (--help lists the flags)"),
        (["--max_steps", "5", "000"], "000: the value of no flag; did you mean --max_steps 5000?"),
        (["max_steps=5"], "max_steps=5: the value of no flag; did you mean --max_steps=5?"),
        (["--seed", "1", "max_steps=5"], "max_steps=5: the value of no flag; did you mean --max_steps=5?"),
        (["--config", "debug"], "--config debug: no such file; did you mean pretrain/configs/debug.yaml?"),
        (["--config", "llammlein_1b.yaml"], "did you mean pretrain/configs/LLaMmlein_1B.yaml?"),
        (
            ["--config", "pretrain/configs"],
            "a folder; did you mean --config pretrain/configs/LLaMmlein_120M.yaml or ",
        ),
        (["--config", "/"], "--config /: is a folder; did you mean --config pretrain/configs/LLaMmlein_120M.yaml or "),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput) as refused:
        parse(*argv)
    assert str(refused.value).startswith(message) or message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlr: 1e-3\n", "line 2: no setting lr; did you mean learning_rate?"),
        ("max_steps: many\n", "line 1: max_steps many: must be a whole number"),
        ("seed:\n", "line 1: seed null: must be a whole number"),
        ("seed: 1\n\nseed: 2\n", "line 3: seed stands here twice"),
        ("model:\n  name: x\n", "line 1: no setting model; did you mean model_name?"),
        ("seed:\n  value: 3\n", "line 1: seed: must be one value or a list of values"),
        ("seed: [1, 2]\n", "line 1: seed [1, 2]: must be one value, not a list"),
        ("- seed\n", "must hold lines of the form `name: value`"),
        ("seed 3\n", "must hold lines of the form `name: value`"),
        ("seed: 1\n\twandb: off\n", "line 2: this is not YAML"),
        ("seed: [1\n", "this is not YAML"),
    ],
)
def test_mistakes_in_a_file_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        parse("--config", yaml_file(tmp_path, text))
    assert message in str(refused.value)
    assert "run.yaml" in str(refused.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(BadInput, match="not YAML"):
        parse("--config", str(tmp_path / "run.yaml"))


def test_a_run_folder_as_config_names_its_settings(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("seed: 1\n")
    with pytest.raises(BadInput, match=f"did you mean --config {tmp_path}/settings.yaml"):
        parse("--config", str(tmp_path))


def test_the_sites_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sourced site file is enough; the recipe is train_fabric.sh's."""
    for name in ("TRAIN_DATA_DIR", "VAL_DATA_DIR", "TOKENIZER_PATH", "CACHE_DIR", "CONFIG", "MODEL_NAME"):
        monkeypatch.delenv(name, raising=False)
    configs = ROOT / "pretrain/configs"
    assert site_settings(configs) == {}
    monkeypatch.setenv("TRAIN_DATA_DIR", "/data/train")
    monkeypatch.setenv("VAL_DATA_DIR", "")
    monkeypatch.setenv("TOKENIZER_PATH", "/data/tokenizer")
    settings, files = parse_settings(Settings, [], "", environment=site_settings(configs))
    assert (settings.train_data_dir, settings.val_data_dir) == ("/data/train", None)
    assert settings.tokenizer_path == "/data/tokenizer"
    assert files == [configs / "LLaMmlein_1B.yaml"]
    assert (settings.micro_batch_size, settings.learning_rate) == (16, 4e-4)

    monkeypatch.setenv("MODEL_NAME", "LLaMmlein_7B")
    settings, files = parse_settings(Settings, [], "", environment=site_settings(configs))
    assert settings.model_name == "LLaMmlein_7B"
    assert files == [configs / "LLaMmlein_7B.yaml"]

    monkeypatch.setenv("CONFIG", str(configs / "debug.yaml"))
    argv = ["--train_data_dir", "/other"]
    settings, files = parse_settings(Settings, argv, "", environment=site_settings(configs))
    assert (settings.model_name, settings.train_data_dir) == ("debug", "/other")
    _, files = parse_settings(Settings, ["--config", str(RECIPES[0])], "", environment=site_settings(configs))
    assert files == [RECIPES[0]], "a flag replaces CONFIG"


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--max_steps", "1e3", "--print_config")
    assert ended.value.code in (None, 0)
    assert yaml.safe_load(capsys.readouterr().out)["max_steps"] == 1000


def test_help_lists_the_common_flags_first_and_each_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert flags[2 : 2 + len(COMMON)] == [f"--{name}" for name in COMMON]
    assert sorted(flags[2:]) == sorted(f"--{field.name}" for field in dataclasses.fields(Settings))
    assert "Union" not in text
    assert "Peak learning rate (default: 0.00025)" in text
    assert max(map(len, text.splitlines())) <= 120
