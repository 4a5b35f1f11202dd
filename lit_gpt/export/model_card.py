"""The model card: README.md of an exported folder, written only from what the run recorded.

Every figure comes from the checkpoint's run.json, the run folder's metrics.csv, or the data set's manifest. What is not
recorded, or not on this machine, is called unknown. Paths and environment variables are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.checkpoint.record import Checkpoint
from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import TokenStore
from lit_gpt.datapoints.run_folder import read_metrics
from lit_gpt.export.parity import Parity
from lit_gpt.files import rewrite, save_figure
from lit_gpt.report.run_view import RECORD

PICTURE = "loss.png"
_PATH_ENDINGS = ("_dir", "_path", "resume")
"""Settings that are paths."""


class Card(NamedTuple):
    """What the card says beside what the checkpoint records."""

    license: str
    """Identifier from Hugging Face's list, such as apache-2.0; "unknown" if none is given."""
    weights: str
    """Type of the stored weights, such as bfloat16."""
    parity: Parity


def write_card(folder: Path, checkpoint: Checkpoint, card: Card) -> None:
    """Write README.md, and loss.png if the run folder has metrics."""
    metrics = read_metrics(checkpoint.path.parent / "metrics.csv", checkpoint.step)
    if metrics:
        _draw(metrics, folder / PICTURE)
    lines = _lines(checkpoint, card, metrics, record=(folder / RECORD).is_dir())
    rewrite(folder / "README.md", ("\n".join(lines) + "\n").encode())


def tells_of(folder: Path, checkpoint: Checkpoint) -> bool:
    """Whether the folder's card was written for this very state, not another checkpoint of the same step."""
    card = folder / "README.md"
    return card.is_file() and checkpoint.state_xxh3 in card.read_text(encoding="utf-8")


def _lines(checkpoint: Checkpoint, card: Card, metrics: list[dict[str, str]], *, record: bool) -> Iterator[str]:
    name = checkpoint.config.name
    yield from ("---", "language: de", f"license: {card.license}", "library_name: transformers")
    yield from ("pipeline_tag: text-generation", "tags:", "- llama", "- pretrained", "---", "")
    yield from (f"# {name}, step {checkpoint.step:,}", "")
    yield "A LLaMA pretrained from scratch. It continues text; it was not trained to chat or to follow instructions."
    yield from ("", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "")
    yield 'folder = "."  # or the name of the repository'
    yield "tokenizer = AutoTokenizer.from_pretrained(folder)"
    yield 'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")'
    yield 'ids = model.generate(**tokenizer("Am Morgen", return_tensors="pt"), max_new_tokens=40)'
    yield from ("print(tokenizer.decode(ids[0]))", "```", "")
    yield from _table("Model", _model(checkpoint, card))
    yield from _table("Data", _data(checkpoint.facts))
    yield from _table("Training", _training(checkpoint, metrics))
    if record:
        yield from _record(checkpoint)
    if metrics:
        yield from (f"![loss over steps]({PICTURE})", "")
    settings = checkpoint.facts.get("settings", {})
    resolved = checkpoint.facts.get("resolved", {})
    settings = {name: resolved.get(name, value) for name, value in settings.items()}
    shown = {key: value for key, value in settings.items() if not key.endswith(_PATH_ENDINGS) and value is not None}
    if shown:
        yield from _table("Settings", ((f"`{key}`", f"`{value}`") for key, value in shown.items()))


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield from (f"## {title}", "", "| | |", "|---|---|")
    yield from (f"| {key} | {value} |" for key, value in rows)
    yield ""


def _model(checkpoint: Checkpoint, card: Card) -> Iterator[tuple[str, str]]:
    config = checkpoint.config
    yield "parameters", f"{config.parameters:,}"
    yield "blocks, heads, key-value heads", f"{config.n_layer}, {config.n_head}, {config.n_query_groups}"
    yield "width, MLP width", f"{config.n_embd:,}, {config.intermediate_size:,}"
    yield "context", f"{config.block_size:,} tokens"
    yield "vocabulary", f"{config.vocab_size:,} ids, padded to {config.padded_vocab_size:,}"
    yield "weights", card.weights
    yield "proof", f"logits of transformers against those of the training code in fp32: {card.parity}"


def _data(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "data set", ", ".join(f"`{name}`" for name in facts.get("dataset_id", [])) or "unknown"
    yield "documents, tokens", _counts(facts)
    if mark := facts.get("datapoint_log"):
        log_of_run = f"attempt {mark['attempt']}, {mark['bytes']:,} bytes, xxh3 `{mark['xxh3']}`"
        yield "record of what each step saw", f"`datapoints/` of the run folder: {log_of_run}"
    yield "tokenizer", f"`{facts.get('tokenizer_fingerprint', 'unknown')}`"


def _counts(facts: dict[str, Any]) -> str:
    """Documents and tokens, from the manifests if the run's data sets are on this machine."""
    try:
        stores = [TokenStore.open(folder) for folder in facts["train_data_dir"]]
    except (BadInput, KeyError):
        return "unknown: the data set was not at hand when this was written"
    if [store.dataset_id for store in stores] != facts.get("dataset_id"):
        return "unknown: the data set was changed since"
    return f"{sum(store.documents for store in stores):,}, {sum(store.tokens for store in stores):,}"


def _training(checkpoint: Checkpoint, metrics: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    facts, config = checkpoint.facts, checkpoint.config
    tokens = facts.get("tokens", 0)
    yield "steps", f"{checkpoint.step:,}"
    if average := facts.get("average"):
        parts, half_life = average["checkpoints"], average["half_life_steps"]
        how = "all alike" if half_life is None else f"half as much for every {half_life:g} steps before the newest"
        yield "weights", f"the average of {len(parts)} checkpoints, {how}: {_parts(parts)}"
    yield "state of weights and optimizer", f"xxh3 `{checkpoint.state_xxh3}`"
    yield "tokens trained", f"{tokens:,}"
    flops = tokens * config.flops_per_token(with_embedding=False)
    yield "computation", f"{flops:.2e} FLOP (6 N + 12 L d T a token, N without the embedding)"
    for name, title in (("loss", "training loss"), ("val_loss", "validation loss"), ("val_bits_per_byte", "")):
        if values := [row[name] for row in metrics if row.get(name)]:
            of = ", of the newest weights, not of the average" if average else ""
            yield (title or "validation bits per byte") + of, f"{float(values[-1]):.4f}"
    if settings := facts.get("settings"):
        muon = settings.get("optimizer") == "muon"
        yield "optimizer", "Muon for the matrices of the blocks, AdamW for the rest" if muon else "AdamW"
    environment = facts.get("environment", {})
    yield "processes", str(facts.get("world_size", "unknown"))
    yield "hardware", environment.get("hardware", "not recorded")
    yield "energy", _energy(metrics, tokens)
    yield "code", f"`{environment.get('git_commit', 'unknown')}`"
    packages = environment.get("packages", {})
    yield "packages", ", ".join(f"{name} {version}" for name, version in packages.items()) or "not recorded"


def _energy(metrics: list[dict[str, str]], tokens: int) -> str:
    """Of the steps that led to the checkpoint; those that a crash or a rollback threw away are not in it."""
    used: dict[str, list[float]] = {}
    counted = 0.0
    for row in metrics:
        if row.get("joules_per_token"):
            joules = {
                part: float(row[f"{part.lower()}_energy_j"])
                for part in ("GPU", "host")
                if row[f"{part.lower()}_energy_j"]
            }
            counted += sum(joules.values()) / float(row["joules_per_token"])
            for part, value in joules.items():
                used.setdefault(part, []).append(value)
    if not counted:
        return "not recorded"
    parts = [f"{part}s {sum(values) / 3.6e6:,.3g} kWh" for part, values in used.items()]
    parts += [f"{part}s not recorded" for part in ("GPU", "host") if part not in used]
    share = [] if counted > 0.99 * tokens else [f"recorded for {counted / tokens:.0%} of the tokens"]
    total = sum(map(sum, used.values()))
    return f"{total / counted:.3g} J a token: {', '.join([*parts, *share])}"


def _parts(parts: list[dict[str, Any]]) -> str:
    """The steps of an average with their states."""
    return ", ".join(f"step {part['step']:,} (xxh3 `{part['state_xxh3']}`)" for part in parts)


def _record(checkpoint: Checkpoint) -> Iterator[str]:
    mark = checkpoint.facts["datapoint_log"]
    yield from ("## Record of the training", "")
    yield f"What each step saw is in [{RECORD}/]({RECORD}), with the settings, the metrics and the"
    yield f"[report]({RECORD}/report.html). Its `datapoints/steps.jsonl` has {mark['bytes']:,} bytes with the xxh3"
    yield f"`{mark['xxh3']}`, as the checkpoint was saved with. Each step's digest is a hash of its tokens: whoever"
    yield "has the data sets named above compares them by"
    yield from ("", "```bash")
    yield f"python scripts/datapoints.py verify --run_dir {RECORD} --data_dir DATA_SET"
    yield from ("```", "")


def _draw(metrics: list[dict[str, str]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(int(row["step"]), float(row[name])) for row in metrics if row.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=150)
