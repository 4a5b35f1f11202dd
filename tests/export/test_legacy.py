"""Files of the published programs: made here in their layout, imported, compared with transformers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_gpt.checkpoint.checkpoint import model_tensors, verified
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.data.token_store import write_store
from lit_gpt.export import legacy
from lit_gpt.model.gpt import GPT
from scripts import convert_hf_checkpoint
from tests.support.training import EOS, documents, metrics, train

CONFIG = Config.from_name("debug")  # 4 query heads in 2 groups


def hf_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            attn_implementation="eager",
        )
    )
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def published(model: LlamaForCausalLM, *, swiglu: bool, prefix: str = "") -> dict:
    """The state as the published programs save it; each group of qkv has 2 queries, a key and a value of 32 rows."""
    theirs = {name: weight.detach() for name, weight in model.state_dict().items()}
    names = ("swiglu.w1", "swiglu.w2", "swiglu.w3") if swiglu else ("fc_1", "fc_2", "proj")
    ours = {"lm_head.weight": theirs["lm_head.weight"], "transformer.wte.weight": theirs["model.embed_tokens.weight"]}
    for i in range(4):
        block, to = f"model.layers.{i}.", f"transformer.h.{i}."
        q, k, v = (theirs[f"{block}self_attn.{part}_proj.weight"] for part in "qkv")
        qkv = [q[:64], k[:32], v[:32], q[64:], k[32:], v[32:]]
        ours |= {
            f"{to}norm_1.weight": theirs[f"{block}input_layernorm.weight"],
            f"{to}attn.attn.weight": torch.cat(qkv),
            f"{to}attn.proj.weight": theirs[f"{block}self_attn.o_proj.weight"],
            f"{to}norm_2.weight": theirs[f"{block}post_attention_layernorm.weight"],
        }
        for name, part in zip(names, ("gate", "up", "down"), strict=True):
            ours[f"{to}mlp.{name}.weight"] = theirs[f"{block}mlp.{part}_proj.weight"]
    ours["transformer.ln_f.weight"] = theirs["model.norm.weight"]
    return {
        "model": {prefix + name: weight for name, weight in ours.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "hparams": {"model_name": "debug", "learning_rate": 4e-4},
        "iter_num": 34000,
        "step_count": 17000,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("swiglu", "prefix"), [(True, ""), (False, "_forward_module.")])
def test_an_iter_pth_gives_the_logits_of_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, swiglu: bool, prefix: str
) -> None:
    model = hf_model()
    torch.save(published(model, swiglu=swiglu, prefix=prefix), tmp_path / "iter-00034000-ckpt.pth")
    destination = tmp_path / "run" / "iter-00000000-ckpt.pth"
    with caplog.at_level(logging.INFO):
        convert_hf_checkpoint.main(
            ["--checkpoint_dir", str(tmp_path / "iter-00034000-ckpt.pth"), "--destination_path", str(destination)]
        )
    assert "optimizer, hparams, iter_num, step_count" in caplog.text
    ours = GPT(CONFIG)
    ours.load_state_dict(dict(model_tensors(verified(destination))))
    tokens = torch.randint(4096, (1, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = model(tokens).logits, ours(tokens)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_a_training_goes_on_from_it(tmp_path: Path) -> None:
    """AdamW's first step moves each weight by the learning rate, where there is a gradient, and decays it."""
    model = hf_model()
    torch.save(published(model, swiglu=True), tmp_path / "iter-00034000-ckpt.pth")
    run, source = tmp_path / "run", tmp_path / "iter-00034000-ckpt.pth"
    destination = str(run / "iter-00000000-ckpt.pth")
    convert_hf_checkpoint.main(["--checkpoint_dir", str(source), "--destination_path", destination])
    write_store(
        tmp_path / "train", documents(120, 1), tokenizer_fingerprint="test", vocab_size=4096, bos_id=1, eos_id=EOS,
        shard_tokens=6000,
    )  # fmt: skip
    changes = dict(val_data_dir=None, block_size=256, max_steps=4, weight_decay=0.25, save_interval_steps=1)
    train(tmp_path, run, resume="auto", keep_last_checkpoints=4, **changes)
    line = metrics(run)[0]
    rate = float(line["learning_rate"])
    assert line["step"] == "1"
    assert rate == 1e-3  # a third of the warm-up
    after = dict(model_tensors(verified(run / "iter-00000001-ckpt.pth")))
    theirs = model.state_dict()
    for name, before, decay in (
        ("lm_head.weight", theirs["lm_head.weight"], 0.25),
        ("transformer.wte.weight", theirs["model.embed_tokens.weight"], 0.25),
        ("transformer.ln_f.weight", theirs["model.norm.weight"], 0.0),
    ):
        moved = (after[name] - before * (1 - rate * decay)).abs()
        assert moved.max() <= rate * 1.001, name
        assert moved[moved > rate / 2].median() == pytest.approx(rate, rel=1e-3), name


@pytest.mark.slow
def test_a_wrong_order_of_heads_is_found_and_nothing_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(published(hf_model(), swiglu=True), tmp_path / "iter.pth")
    real = legacy._part_of_groups
    monkeypatch.setattr(
        legacy, "_part_of_groups", lambda w, c, n, o: real(w, c, n, o).roll(32 if "q_proj" in n else 0, 0)
    )
    with pytest.raises(BadInput, match="the logits of both sides differ"):
        convert_hf_checkpoint.main(
            ["--checkpoint_dir", str(tmp_path / "iter.pth"), "--destination_path", str(tmp_path / "run/x")]
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("model"), "holds no weights under 'model'"),
        (lambda state: state["hparams"].pop("model_name"), "does not say its shape: give --model_name"),
        (lambda state: state["model"].pop("transformer.h.2.attn.attn.weight"), r"q_proj\.weight' is missing"),
        (lambda state: state["model"].update({"transformer.h.0.x.weight": torch.ones(1)}), "unknown to a LLaMA"),
        (lambda state: state["model"].update({"transformer.h.0.mlp.fc_1.weight": torch.ones(1)}), "weight twice"),
        (lambda state: state["model"].update({"transformer.h.0.attn.attn.weight": torch.ones(3, 3)}), "has shape"),
        (lambda state: state["model"].update({"lm_head.weight": torch.ones(2, dtype=torch.int8)}), "as torch.int8"),
        (lambda state: state["model"]["transformer.ln_f.weight"].fill_(float("nan")), "NaN or infinity"),
        (lambda state: state.update(hparams=Path("x")), "is damaged, or holds more than weights"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_such_a_state_is_one_line(tmp_path: Path, change: object, said: str) -> None:
    state = published(hf_model(), swiglu=True)
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / "iter.pth")
    with pytest.raises(BadInput, match=said) as caught:
        convert_hf_checkpoint.main(
            ["--checkpoint_dir", str(tmp_path / "iter.pth"), "--destination_path", str(tmp_path / "run/x")]
        )
    assert "\n" not in str(caught.value)
