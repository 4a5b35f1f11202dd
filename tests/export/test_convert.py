"""Checkpoint to Hugging Face folder and back: loads in transformers, same logits, same bits; faults publish nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_gpt.checkpoint import checkpoint as checkpoints
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.data.token_store import write_store
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export import hf_export, hf_folder, hf_import
from lit_gpt.export.hf_weights import hf_config
from lit_gpt.export.parity import GERMAN_TEXT
from lit_gpt.model.gpt import GPT
from scripts import convert_hf_checkpoint, convert_lit_checkpoint, generate

ROOT = Path(__file__).resolve().parents[2]


def export(run_dir: Path, destination: Path, *more: str, step: int = 7) -> None:
    checkpoint = run_dir / f"iter-{step:08d}-ckpt.pth"
    convert_lit_checkpoint.main(["--checkpoint", str(checkpoint), "--destination_path", str(destination), *more])


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoints.model_tensors(checkpoints.verified(checkpoint)))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "step"), [("fp32", 7), ("fp32", 8), ("bf16", 8), ("fp16", 7)])
def test_transformers_loads_it_and_computes_the_same(run_dir: Path, tmp_path: Path, dtype: str, step: int) -> None:
    export(run_dir, tmp_path / "hf", "--dtype", dtype, step=step)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto", output_loading_info=True)
    assert not any(loading.values())
    assert theirs.dtype == stored
    assert theirs.generation_config.suppress_tokens == list(range(300, 320))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (0, 1)

    ours = GPT(Config.from_name("debug", vocab_size=300))
    rounded = {
        name: weight.to(stored).float() for name, weight in weights_of(run_dir / "iter-00000007-ckpt.pth").items()
    }
    ours.load_state_dict(rounded)
    tokens = torch.tensor([tokenizer(GERMAN_TEXT).input_ids[:256]])
    with torch.no_grad():
        expected, found = ours(tokens), theirs.float()(tokens).logits
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_sharded_and_full_checkpoints_export_to_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "full", step=7)
    export(run_dir, tmp_path / "sharded", step=8)
    files = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert files == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    for name in files[1:]:
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()


def test_weight_files_are_split_at_the_size_asked_for(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "hf", "--dtype", "fp32", "--max_shard_size", "1MB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) == 4
    assert max(path.stat().st_size for path in files) < 1_010_000
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values())
    assert theirs.num_parameters() == Config.from_name("debug", vocab_size=300).parameters


@pytest.mark.slow
def test_round_trip_gives_identical_weights_and_identical_files(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "hf", "--dtype", "fp32")
    again = tmp_path / "run" / "iter-00000000-ckpt.pth"
    convert_hf_checkpoint.main(["--checkpoint_dir", str(tmp_path / "hf"), "--destination_path", str(again)])
    before, after = weights_of(run_dir / "iter-00000007-ckpt.pth"), weights_of(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    checkpoint = checkpoints.verified(again)
    assert checkpoint.config == Config.from_name("debug", vocab_size=300)
    assert checkpoint.step == 0
    export(tmp_path / "run", tmp_path / "hf2", "--dtype", "fp32", step=0)
    for path in (tmp_path / "hf").glob("*[!d]"):  # all but README.md, which tells of another run
        assert path.read_bytes() == (tmp_path / "hf2" / path.name).read_bytes(), path.name


def test_a_cut_vocabulary_goes_there_and_back(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "hf", "--dtype", "fp32", "--vocabulary", "cut")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (
        theirs.config.vocab_size == 300 == theirs.lm_head.weight.shape[0] == theirs.model.embed_tokens.weight.shape[0]
    )
    assert theirs.generation_config.suppress_tokens is None
    again = tmp_path / "iter-00000000-ckpt.pth"
    convert_hf_checkpoint.main(["--checkpoint_dir", str(tmp_path / "hf"), "--destination_path", str(again)])
    before, after = weights_of(run_dir / "iter-00000007-ckpt.pth"), weights_of(again)
    assert torch.equal(before["lm_head.weight"][:300], after["lm_head.weight"][:300])
    assert after["lm_head.weight"].shape == (320, 128)


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_a_model_that_transformers_saved_is_imported(tmp_path: Path, form: str) -> None:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="1MB" if form == "shards" else "5GB")
    if form == "bin":
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    destination = tmp_path / "iter-00000000-ckpt.pth"
    convert_hf_checkpoint.main(["--checkpoint_dir", str(tmp_path / "hf"), "--destination_path", str(destination)])
    ours = GPT(checkpoints.verified(destination).config)
    ours.load_state_dict(weights_of(destination))
    tokens = torch.randint(4096, (1, 99))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_logits_are_compared_on_the_validation_set_where_it_is(
    run_dir: Path, tokenizer_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_path)
    write_store(
        tmp_path / "val", [("a", [*tokenizer.encode(GERMAN_TEXT), 1])],
        tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=300, bos_id=0, eos_id=1,
    )  # fmt: skip
    source = run_dir / "iter-00000007-ckpt.pth"
    checkpoint = checkpoints.verified(source)
    path = tmp_path / "iter-00000009-ckpt.pth"
    facts = {**checkpoint.facts, "step": 9, "val_data_dir": str(tmp_path / "val")}
    checkpoints.write_initial(path, checkpoint.config, weights_of(source).items(), facts)
    with caplog.at_level("INFO"):
        export(tmp_path, tmp_path / "hf", step=9)
    assert f"on the beginning of {tmp_path / 'val'}" in caplog.text
    assert "256 tokens" in caplog.text


# Faults: each is one line, and nothing is left ------------------------------------------------------------------------


def refused_export(run_dir: Path, tmp_path: Path, message: str, *more: str, step: int = 7) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match=message) as caught:
        export(run_dir, tmp_path / "hf", *more, step=step)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def changed_run(run_dir: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], **facts: object) -> Path:
    """A run folder whose checkpoint, at step 9, has some weights replaced (None: left out), and a valid manifest."""
    source = checkpoints.verified(run_dir / "iter-00000007-ckpt.pth")
    weights = {name: change.get(name, weight) for name, weight in weights_of(source.path).items()}
    kept = [(name, weight) for name, weight in weights.items() if weight is not None]
    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.write_initial(
        folder / "iter-00000009-ckpt.pth", source.config, kept, source.facts | {"step": 9} | facts
    )
    return folder


def test_a_flipped_bit_in_the_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    run = changed_run(run_dir, tmp_path, {})
    path = run / "iter-00000009-ckpt.pth" / "state.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused_export(run, tmp_path, r"state\.pth is corrupt", step=9)


@pytest.mark.slow
def test_missing_nan_and_misshapen_weights(run_dir: Path, tmp_path: Path) -> None:
    name = "transformer.h.2.mlp.down.weight"
    differs = f"weights are not those of the model in run.json: '{name}' is missing, unknown or of another shape"
    refused_export(changed_run(run_dir, tmp_path, {name: None}), tmp_path, f"the 26 {differs}", step=9)
    wrong = {name: torch.ones(3, 3)}
    refused_export(changed_run(run_dir, tmp_path, wrong), tmp_path, f"the 27 {differs}", step=9)
    nan = {name: torch.full((128, 352), float("nan"))}
    refused_export(
        changed_run(run_dir, tmp_path, nan), tmp_path, r"weights that are not finite numbers: .*mlp.down.weight", step=9
    )
    large = {name: torch.full((128, 352), 1e5)}
    refused_export(changed_run(run_dir, tmp_path, large), tmp_path, "use bf16", "--dtype", "fp16", step=9)


def test_a_wrong_registry_name(run_dir: Path, tmp_path: Path) -> None:
    message = "is a checkpoint of debug, not of LLaMmlein_1B: its n_layer is 4, not 22"
    refused_export(run_dir, tmp_path, message, "--model_name", "LLaMmlein_1B")
    refused_export(run_dir, tmp_path, "unknown model_name 'nonsense'", "--model_name", "nonsense")


def test_a_wrong_tokenizer(run_dir: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    rules = json.loads((tokenizer_path / "tokenizer.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (other / "tokenizer.json").write_text(json.dumps(rules))
    refused_export(run_dir, tmp_path, "fingerprint differs", "--tokenizer_path", str(other))
    rules["added_tokens"].append({**rules["added_tokens"][0], "id": 300, "content": "<more>"})
    (other / "tokenizer.json").write_text(json.dumps(rules))
    refused_export(run_dir, tmp_path, "vocabulary mismatch: .* has 301 ids", "--tokenizer_path", str(other))
    refused_export(run_dir, tmp_path, "there is no such folder", "--tokenizer_path", str(tmp_path / "absent"))


def test_paths_and_sizes(run_dir: Path, tmp_path: Path) -> None:
    refused_export(run_dir, tmp_path, "no such checkpoint folder", step=1)
    refused_export(run_dir, tmp_path, "is no size", "--max_shard_size", "5 apples")
    (tmp_path / "hf").mkdir()
    refused_export(run_dir, tmp_path, "exists already")
    state = run_dir / "iter-00000007-ckpt.pth" / "state.pth"
    with pytest.raises(BadInput, match=f"that is a file of a checkpoint; give its folder, {state.parent}"):
        convert_lit_checkpoint.main(["--checkpoint", str(state), "--destination_path", str(tmp_path / "x")])
    with pytest.raises(BadInput, match=r"that is a file of a model's folder; give the folder, a"):
        convert_hf_checkpoint.main(["--checkpoint_dir", "a/config.json", "--destination_path", str(tmp_path / "x")])
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot write .*: Not a directory"):
        export(run_dir, tmp_path / "file" / "hf")


def test_a_wrong_forward_pass_publishes_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check covers the computation, not only the files: it finds a slightly wrong norm_eps."""
    monkeypatch.setattr(
        hf_export, "hf_config", lambda *args, **facts: hf_config(*args, **facts) | {"rms_norm_eps": 2e-5}
    )
    refused_export(run_dir, tmp_path, "logits of both sides differ")


@pytest.mark.slow
def test_a_terminated_export_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/convert_lit_checkpoint.py", "--destination_path", str(tmp_path / "hf")]
    checkpoint = str(run_dir / "iter-00000007-ckpt.pth")
    process = subprocess.Popen(
        [*command, "--checkpoint", checkpoint], cwd=ROOT, env=with_root(), stderr=subprocess.PIPE
    )
    while process.poll() is None and not list(tmp_path.glob(".hf.*.partial")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_an_older_index_is_imported_as_transformers_reads_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin is loaded by transformers, so a reader that takes other files is found."""
    source = tmp_path / "hf"
    export(run_dir, source, "--dtype", "fp32")
    weights = load_file(source / "model.safetensors")
    older = {name: weight * 1.5 for name, weight in weights.items()}
    save_file(older, source / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    arguments = ["--checkpoint_dir", str(source), "--destination_path"]
    convert_hf_checkpoint.main([*arguments, str(tmp_path / "new" / "iter-00000000-ckpt.pth")])
    found = weights_of(tmp_path / "new" / "iter-00000000-ckpt.pth")["transformer.ln_f.weight"]
    assert torch.equal(found, weights["model.norm.weight"])
    monkeypatch.setattr(hf_folder, "_ENTRIES", ("model.safetensors.index.json",))
    with pytest.raises(BadInput, match="the logits of both sides differ"):
        convert_hf_checkpoint.main([*arguments, str(tmp_path / "other" / "iter-00000000-ckpt.pth")])
    assert not (tmp_path / "other").exists()


def test_an_import_that_fails_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    export(run_dir, source, "--dtype", "fp32")
    weights = {k: v.clone() for k, v in load_file(source / "model.safetensors").items()}  # the file is replaced below

    def refused(message: str, *more: str) -> None:
        before = sorted(tmp_path.iterdir())
        arguments = ["--checkpoint_dir", str(source), "--destination_path", str(tmp_path / "new" / "ckpt")]
        with pytest.raises(BadInput, match=message):
            convert_hf_checkpoint.main([*arguments, *more])
        assert sorted(tmp_path.iterdir()) == before

    refused("not a LLaMmlein_120M: its n_layer is 4, not 12", "--model_name", "LLaMmlein_120M")
    name = "model.layers.3.self_attn.v_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, source / "model.safetensors")
    refused(f"weight '{name}' is missing")
    save_file({**weights, "model.layers.4.mlp.up_proj.weight": weights[name].clone()}, source / "model.safetensors")
    refused(r"weight 'model\.layers\.4\.mlp\.up_proj\.weight' is unknown")
    save_file({**weights, name: weights[name] * float("inf")}, source / "model.safetensors")
    refused(f"weight '{name}' holds NaN or infinity")
    save_file(weights, source / "model.safetensors")
    facts = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**facts, "vocab_size": 4096}))
    refused(r"vocabulary mismatch: the folder's matrices have 4096 rows, its tokenizer 300 ids \(320 with padding\)")
    (source / "config.json").unlink()
    refused(r"holds no config\.json")


def test_where_logits_differ_the_keys_that_were_not_read_are_named(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hf"
    export(run_dir, source, "--dtype", "fp32")
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"logit_scale": 0.5, "mup": True}))
    monkeypatch.setattr(hf_import, "our_logits", lambda *_: torch.zeros(256, 320))
    with pytest.raises(BadInput, match=r"logits .* differ.* config\.json that are not read here: logit_scale, mup$"):
        convert_hf_checkpoint.main(["--checkpoint_dir", str(source), "--destination_path", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


# create.sh and generate.py --------------------------------------------------------------------------------------------


def with_root(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **variables}


def create(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts/create.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, env=with_root(**variables), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_create_takes_the_newest_checkpoint_of_the_run(run_dir: Path, tmp_path: Path) -> None:
    done = create(cwd=tmp_path, OUT_DIR=str(run_dir), FINAL_MODEL="model", MODEL_NAME="debug")
    assert done.returncode == 0, done.stderr
    assert "logits agree: largest difference" in done.stderr
    lines = done.stderr.splitlines()
    warnings = [line for line in lines if " INFO " not in line]
    assert len(warnings) == 1, done.stderr  # none of a library
    assert "does not say whether documents begin with BOS" in warnings[0]
    assert lines[-1].endswith(f"next: python {ROOT}/scripts/generate.py --model model --prompt 'Die Stadt'")
    step_7 = tmp_path / "step 7"  # a space, and the arguments in place of the variables
    done = create(str(run_dir / "iter-00000007-ckpt.pth"), str(step_7), "--dtype", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (step_7 / "model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "no checkpoint given"),
        ([], {"OUT_DIR": "absent"}, "no run folder absent"),
        ([], {"MODEL_NAME": "absent"}, "no run folder"),
        ([], {"OUT_DIR": "."}, "no checkpoint iter-XXXXXXXX-ckpt.pth in ."),
        ([], {"OUT_DIR": ".", "ITERATION_NUM": "8"}, "no checkpoint ./iter-00000008-ckpt.pth"),
        ([], {"OUT_DIR": ".", "ITERATION_NUM": "x"}, "ITERATION_NUM=x: must be a step"),
        (["absent"], {}, "no checkpoint absent"),
        (
            ["steps/iter-00000011-ckpt.pth"],
            {},
            "iter-00000011-ckpt.pth; its folder has the steps 9 10",
        ),
        (["run"], {}, "run is a run folder: OUT_DIR=run exports its newest checkpoint"),
        (["a", "b", "c"], {}, "two arguments at most"),
        (["."], {"CONTAINER_PATH": "absent.sif"}, "no container CONTAINER_PATH=absent.sif"),
    ],
)
def test_create_refuses_in_one_line(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.yaml").touch()
    for step in (9, 10):
        (tmp_path / f"steps/iter-{step:08d}-ckpt.pth").mkdir(parents=True)
    done = create(*arguments, cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_create_runs_in_the_container(run_dir: Path, tmp_path: Path) -> None:
    """A stand-in for apptainer shows what it would be called with."""
    (tmp_path / "bin").mkdir()
    engine = tmp_path / "bin" / "apptainer"
    engine.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    engine.chmod(0o755)
    (tmp_path / "image.sif").write_text("")
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CONTAINER_PATH": "image.sif"}
    done = create(str(run_dir / "iter-00000007-ckpt.pth"), "out/hf", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    called = done.stdout.splitlines()
    assert called[0] == "exec"
    binds = [called[i + 1] for i, argument in enumerate(called) if argument == "--bind"]
    assert binds == [str(ROOT), str(tmp_path), str(run_dir), str(tmp_path / "out")]
    (tmp_path / "elsewhere/tok").mkdir(parents=True)
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run/settings.yaml").write_text(f"seed: 1\ntokenizer_path: {tmp_path}/elsewhere/tok\n")
    done = create("run/iter-00000007-ckpt.pth", cwd=tmp_path, **variables)
    assert f"--bind\n{tmp_path}/elsewhere/tok\n" in done.stdout, "the tokenizer folder that the run's settings name"
    assert called[called.index("image.sif") + 2 :] == [
        str(ROOT / "scripts/convert_lit_checkpoint.py"),
        *("--checkpoint", str(run_dir / "iter-00000007-ckpt.pth")),
        *("--destination_path", "out/hf"),
    ]


@pytest.mark.slow
def test_generate(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run_dir, tmp_path / "hf")
    texts = []
    for seed in ("1", "1", "2"):
        generate.main(
            ["--model", str(tmp_path / "hf"), "--prompt", "Im Nebel", "--max_new_tokens", "9", "--seed", seed]
        )
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("Im Nebel") for text in texts)
    assert texts[0] == texts[1] != texts[2]
    for arguments, message in [
        (["--prompt", ""], "needs at least one token"),
        (["--prompt", "a", "--max_new_tokens", "256"], "the model reads 256 in all"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1"),
        (["--prompt", "a", "--top_p", "0"], "--top_p 0"),
        (["--prompt", "a", "--chat"], "not allowed with"),
        (["--chat", "--max_new_tokens", "256"], "the model reads 256 in all"),
    ]:
        with pytest.raises(BadInput, match=message):
            generate.main(["--model", str(tmp_path / "hf"), *arguments])
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        generate.main(["--model", str(tmp_path), "--prompt", "a"])


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_tokenizer_that_is_no_file_is_not_taken_for_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    make = {"link": lambda: path.symlink_to("/no/such/blob"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}
    make[kind]()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=f"{path} is no file, or a link that leads to none"):
        convert_hf_checkpoint.main(
            ["--checkpoint_dir", str(tmp_path), "--destination_path", str(tmp_path / "run" / "iter-00000000-ckpt.pth")]
        )


@pytest.mark.slow
def test_chat(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is continued as --prompt would be; an empty one goes on; a long text loses its beginning."""
    checkpoint, likeliest = str(run_dir / "iter-00000007-ckpt.pth"), ["--temperature", "0", "--max_new_tokens"]

    def said(*arguments: str, lines: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        generate.main([*arguments])
        return capsys.readouterr().out

    def continued(prompt: str, tokens: str) -> str:
        whole = said("--model", model, "--prompt", prompt, *likeliest, tokens)
        assert whole.startswith(prompt)
        return whole.removeprefix(prompt)

    export(run_dir, tmp_path / "hf")
    model = str(tmp_path / "hf")
    first, other = continued("Im Nebel", "9"), continued("Am See", "9")
    assert said("--model", model, "--chat", *likeliest, "9", lines="\nIm Nebel\nAm See\n") == f"{first}{other}\n"
    longer = said("--model", model, "--chat", *likeliest, "9", lines="Im Nebel\n\n")
    assert longer.startswith(first.removesuffix("\n"))
    assert len(longer) > len(first) + 3
    assert said("--checkpoint", checkpoint, "--chat", *likeliest, "9", lines="Im Nebel") == f"{first}\n"
    assert said("--model", model, "--chat", *likeliest, "9", lines="Nebel " * 300).count("\n") >= 2
