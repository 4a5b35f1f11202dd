"""What a word means as the value or the name of a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from lit_gpt.cli import BadInput, Parser
from lit_gpt.settings_reader import setting_types
from lit_gpt.train.settings import Settings
from lit_gpt.values import SYNONYMS, PathText, did_you_mean, near_path, read_value

NAMES = list(setting_types(Settings))
WANDB = Literal["off", "online", "offline"]


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (int, "1_430_512", 1430512),
        (int, "1e3", 1000),
        (int, "2.5E3", 2500),
        (int, "0012", 12),
        (int | None, "null", None),
        (int | None, "None", None),
        (float, "1e-3", 0.001),
        (float, "1_000", 1000.0),
        (float, ".inf", float("inf")),
        (bool, "Off", False),
        (bool, "yes", True),
        (bool | None, "1", True),
        (WANDB, "off", "off"),
        (WANDB, "no", "off"),
        (WANDB, "False", "off"),
        (WANDB, "on", "online"),
        (WANDB, "OFFLINE", "offline"),
        (Literal["none", "selective", "full"], "off", "none"),
        (str, "null", "null"),
        (str, "007", "007"),
        (PathText | None, "/a b/c", "/a b/c"),
        (PathText | list[PathText] | None, "a:2", "a:2"),
        (PathText | list[PathText] | None, ["a", "b:0.5"], ["a", "b:0.5"]),
        (list[str], "Hallo", ["Hallo"]),
    ],
)
def test_values(kind: Any, given: str, value: Any) -> None:
    found = read_value(kind, given)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (int, "many", "whole number"),
        (int, "1.5", "whole number"),
        (int, "1e400", "whole number"),
        (int, "inf", "whole number"),
        (int, "4k", "whole number"),
        (int, "", "whole number"),
        (int | None, "many", "whole number"),
        (int, ["1", "2"], "one value"),
        (float, "nan", "a number"),
        (float, "0,1", "a number"),
        (bool, "maybe", "true or false"),
        (WANDB, "onlin", "one of off, online, offline; did you mean online"),
        (Literal["auto", "cpu", "cuda"], "gpu", "one of auto, cpu, cuda; did you mean cuda"),
        (Literal["none", "selective", "full"], "on", "one of none, selective, full"),
    ],
)
def test_refused_values(kind: Any, given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_value(kind, given)


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert read_value(PathText, "~/x") == "/home/me/x"
    assert read_value(PathText, "${SCRATCH}/$SCRATCH") == "/scratch/me//scratch/me"
    assert read_value(str, "~/x $SCRATCH") == "~/x $SCRATCH", "only paths are expanded"
    with pytest.raises(ValueError, match=r"\$NOWHERE, which is not set"):
        read_value(PathText, "$NOWHERE/x")
    with pytest.raises(ValueError, match="home folder of a user"):
        read_value(PathText, "~nobody_at_all/x")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lr", "learning_rate"),
        ("learning_rte", "learning_rate"),
        ("Learning-Rate", "learning_rate"),
        ("train_data", "train_data_dir"),
        ("batch_size", "global_batch_size or micro_batch_size"),
        ("warmup", "warmup_steps"),
        ("epochs", "max_epochs"),
        ("max_train_steps", "max_steps"),
        ("gradient_checkpointing", "activation_checkpointing"),
        ("max_grad_norm", "grad_clip"),
        ("seq_length", "block_size"),
        ("output_dir", "out_dir"),
        ("no_compile", "compile false"),
        ("tensorbord", "tensorboard"),
    ],
)
def test_names(written: str, meant: str) -> None:
    assert did_you_mean(written, NAMES) == f"; did you mean {meant}?"


def test_a_name_like_no_other_suggests_nothing() -> None:
    assert did_you_mean("qqqq", NAMES) == ""


def test_near_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "notes").touch()
    monkeypatch.chdir(tmp_path)
    assert near_path(Path("data/trian")) == "; did you mean data/train?"
    assert near_path(Path("Date/train/MANIFEST.json")) == "; did you mean data?"
    assert near_path(tmp_path / "nots/x/y") == f"; did you mean {tmp_path}/notes?"
    assert near_path(Path("corpus")) == ""
    assert near_path(Path("notes/x")) == "; did you mean notes?"


def test_no_name_of_ours_is_taken_for_another() -> None:
    """Synonyms are names that no setting has: each would be read as itself, and never suggest anything."""
    spread = [other for words in SYNONYMS.values() for other in words.split()]
    assert not set(spread) & set(NAMES) - {"checkpoint", "out_dir"}


def test_programs_read_values_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser("A program.")
    parser.add_argument("--vocab_size", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--destination_path", type=Path, required=True)
    found = parser.parse_args(["--vocab_size", "32e3", "--rate=1e-2", "--destination_path=~/x"])
    assert vars(found) == {"vocab_size": 32000, "rate": 0.01, "destination_path": Path("/home/me/x")}
    for argv, message in (
        (["--output", "x"], "no flag --output; did you mean --destination_path?"),
        (["--vocab", "3"], "no flag --vocab; did you mean --vocab_size?"),
        (["-o", "3"], "no flag -o; did you mean --destination_path?"),
        (["\u2013rate", "3"], "no flag \u2013rate; did you mean --rate?"),
        (["--vocab_size", "4k"], "argument --vocab_size: '4k' must be a whole number"),
        (["--rate", "1"], "required: --destination_path"),
    ):
        with pytest.raises(BadInput) as refused:
            parser.parse_args(argv)
        assert message in str(refused.value)
