"""The whole path on a CPU in minutes: German text, corpus, training that is killed and resumed, Hugging Face model.

`make demo` runs it. All files go to one folder, which is emptied first. A second run is trained without interruption;
then the following is proved from the files of both runs. The exit code is 1 if one proof fails:
  weights   the killed and resumed run and the uninterrupted run end with the same bits
  losses    both runs logged the same loss at every step, also at steps that were trained twice
  rows      every step saw the same rows in both datapoint logs, and the shards confirm the logs' digests
  sources   every document of the last step leads back to its line of the source, and to what was cut from it
  learning  validation bits per byte lie at least 20 % below the unigram entropy of the validation tokens
  export    transformers gives the exported model the validation loss that the trainer logged
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not
from lit_gpt.cli import BadInput, Parser, run_program
from lit_gpt.datapoints.line_log import whole_lines
from lit_gpt.files import discard

# isort: split
# After lit_gpt, which says what to do where these are missing.
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MARKER = ".made-by-demo"
"""Only a folder that holds this file is emptied."""
VOCABULARY = 4096
STEPS = 240
STEPS_LOST = 5
"""The kill comes so many steps after the checkpoint at half of the run; the resumed run trains them again."""
MARGIN = 0.20
"""The validation loss must be lower than the unigram entropy by this share."""
LOSS_TOLERANCE = 1e-5
"""Relative; transformers sums the same numbers in another order."""
LOG_INTERVAL_S = 10
"""Where there is no terminal, the running program's last line is printed so often."""
PROMPT = "Wenn Sie"


class Proof(NamedTuple):
    name: str
    holds: bool
    evidence: str


class Interruption(NamedTuple):
    resumed_from: int
    """Step of the newest checkpoint at the kill."""
    killed_at: int
    """Last step that was logged before SIGKILL."""
    logged: list[dict[str, str]]
    """metrics.csv as the killed program left it."""


class Shell:
    """Runs the project's programs as a user would, from the project's root; each logs to its own file."""

    def __init__(self, logs: Path, console: Console) -> None:
        self.logs = logs
        self.console = console

    def run(self, name: str, command: str, kill_when: Callable[[], bool] | None = None) -> str:
        """Run a command to its end, or SIGKILL it once `kill_when` is true; returns what it printed.

        Any other end exits the demo.
        """
        self.console.print(f"[bold]$[/] {command}", highlight=False, soft_wrap=True)
        told = time.monotonic()
        begin, log, printed, killed = time.monotonic(), self.logs / f"{name}.log", self.logs / f"{name}.out", False
        python_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        with log.open("wb") as stderr, printed.open("wb") as stdout, self.console.status(name) as status:
            environment = {**os.environ, "PATH": python_first}
            process = subprocess.Popen(shlex.split(command), stdout=stdout, stderr=stderr, env=environment)
            try:
                while process.poll() is None:
                    if kill_when and kill_when():
                        process.kill()
                        killed = process.wait() == -signal.SIGKILL
                    status.update(f"{name}  {last_line(log)}")  # shown on a terminal only
                    if not self.console.is_terminal and time.monotonic() - told >= LOG_INTERVAL_S:
                        told = time.monotonic()
                        self.console.print(f"  {last_line(log)}", markup=False, highlight=False, soft_wrap=True)
                    time.sleep(0.05)
            finally:
                process.kill()
        if killed != (kill_when is not None) or (not killed and process.returncode):
            self.console.print(log.read_text(errors="replace")[-3000:], markup=False, highlight=False)
            sys.exit(f"{name} ended with {process.returncode}, which was not expected; its whole log: {log}")
        self.console.print(f"  {'killed after' if killed else 'took'} {time.monotonic() - begin:.0f} s", style="dim")
        return printed.read_text(encoding="utf-8").strip()


def last_line(log: Path) -> str:
    return log.read_bytes()[-400:].decode("utf-8", "replace").strip().rpartition("\n")[2][:100]


def empty_folder(folder: Path) -> None:
    """Make the demo's folder, emptied; raises BadInput for a folder with files that no demo made.

    The marker is there before all else, and stays: wherever a demo is killed, the next one empties its folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = set(folder.iterdir())
        if not inside:
            (folder / MARKER).touch()
        elif folder / MARKER not in inside:
            raise BadInput(f"{folder} exists and was not made by the demo: choose another --destination_path")
        for path in inside - {folder / MARKER}:
            discard(path)
        (folder / "logs").mkdir()
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror}") from None


# Running


def make_data(shell: Shell, folder: Path, source: str) -> None:
    fetched = shell.run(
        "fetch", f"python scripts/fetch_german_text.py --destination_path {folder}/text.jsonl --source {source}"
    )
    shell.console.print(f"  {fetched}", style="dim", markup=False, highlight=False)
    shell.run(
        "tokenizer",
        f"python scripts/train_tokenizer.py --source {folder}/text.jsonl --destination_path {folder}/tokenizer "
        f"--vocab_size {VOCABULARY}",
    )
    made = f"--source {folder}/text.jsonl --tokenizer_path {folder}/tokenizer --destination_path {folder}/corpus"
    shell.run("corpus", f"python scripts/build_corpus.py {made}")
    shell.run("verify-corpus", f"python scripts/build_corpus.py verify {folder}/corpus")
    shell.run(
        "data",
        f"python scripts/prepare_data.py --source {folder}/corpus/documents --tokenizer_path {folder}/tokenizer "
        f"--destination_path {folder}/data --val_fraction 0.05",
    )


def training(folder: Path, run: Path) -> str:
    return (
        f"python pretrain/tinyllama_fabric.py --config pretrain/configs/debug.yaml --out_dir {run} "
        f"--train_data_dir {folder}/data/train --val_data_dir {folder}/data/val --tokenizer_path {folder}/tokenizer "
        f"--global_batch_size 8 --max_steps {STEPS} --save_interval_steps {STEPS // 2} --log_interval_steps 1"
    )


def train(shell: Shell, folder: Path) -> Interruption:
    """Train once with a SIGKILL in the middle and a resume, and once without interruption."""
    run = folder / "run"
    shell.run("training-killed", training(folder, run), lambda: last_step(run) >= checkpoint_step(run) + STEPS_LOST)
    interruption = Interruption(checkpoint_step(run), last_step(run), metrics(run))
    shell.run("training-resumed", f"{training(folder, run)} --resume auto")
    shell.run("training-uninterrupted", training(folder, folder / "run-uninterrupted"))
    return interruption


def newest_checkpoint(run: Path) -> Path | None:
    return max(run.glob("iter-*-ckpt.pth"), default=None)  # the step in the name has a fixed width


def checkpoint_step(run: Path) -> int:
    """Step of the newest checkpoint; without a checkpoint, a step that no run reaches."""
    checkpoint = newest_checkpoint(run)
    return int(checkpoint.name.split("-")[1]) if checkpoint else sys.maxsize


def metrics(run: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv in the order of writing; one that is not whole yet is left out."""
    path = run / "metrics.csv"
    return list(csv.DictReader(whole_lines(path))) if path.exists() else []


def last_step(run: Path) -> int:
    return max((int(row["step"]) for row in metrics(run)), default=-1)


# Proving


def same_weights(run: Path, other: Path) -> Proof:
    """Compare bits, not values: 0.0 and -0.0 differ. First every file of both checkpoints is checked by its hash."""
    from lit_gpt.checkpoint.checkpoint import model_tensors
    from lit_gpt.checkpoint.history import find

    weights = []
    for folder in (run, other):
        checkpoint = find("auto", folder)
        assert checkpoint, f"{folder} holds no whole checkpoint"
        weights.append({name: tensor.numpy().tobytes() for name, tensor in model_tensors(checkpoint)})
    ours, theirs = weights
    unequal = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    size = sum(map(len, ours.values()))
    return Proof("weights", not unequal, f"{len(unequal)} of {len(ours)} tensors differ, {size:,} bytes compared")


def same_losses(interruption: Interruption, run: Path, other: Path) -> Proof:
    """Compare every logged loss as text, from before and after the kill, with the uninterrupted run's."""
    logged = {(row["step"], row["loss"], row["val_loss"]) for row in [*interruption.logged, *metrics(run)]}
    expected = {(row["step"], row["loss"], row["val_loss"]) for row in metrics(other)}
    unequal = {step for step, *_ in logged ^ expected}
    twice = interruption.killed_at - interruption.resumed_from
    return Proof("losses", not unequal, f"{len(unequal)} of {len(expected)} steps differ, {twice} steps trained twice")


def same_rows(run: Path, other: Path) -> Proof:
    """Compare the datapoint logs; `datapoints.py verify`, which ran before, compared the digests with the shards."""
    unequal = {step for step, *_ in logged_rows(run) ^ logged_rows(other)}
    steps = len({step for step, *_ in logged_rows(other)})
    return Proof("rows", not unequal, f"{len(unequal)} of {steps} steps saw other rows")


def logged_rows(run: Path) -> set[tuple[int | str, ...]]:
    """Step, first slot, number of rows and digest of every line; equal lines are one entry."""
    lines = (run / "datapoints/steps.jsonl").read_text(encoding="utf-8").splitlines()
    return {tuple(json.loads(line)[key] for key in ("step", "slot", "rows", "digest")) for line in lines}


def leads_back(run: Path, corpus_folder: Path) -> Proof:
    """Ask the corpus for each document of the last step; its source's text without its rows is the corpus' own."""
    from lit_gpt.corpus.corpus import Corpus
    from lit_gpt.corpus.why import explain, source_record
    from lit_gpt.datapoints.query import Replay

    corpus, step = Corpus(corpus_folder), last_step(run)
    ids = sorted({seen.document for seen in Replay(run).step(step)})
    found = [one for id in ids for one in explain(corpus, id)]
    known = [one for one in found if one.kept and source_record(corpus, one) is not None]
    rows = sum(len(one.rows) for one in found)
    holds = len(known) == len(found) == len(ids) > 0
    return Proof(
        "sources", holds, f"{len(known)} of {len(ids)} documents of step {step} found; {rows} rows of the ledger"
    )


def beats_unigrams(run: Path, val: Path) -> Proof:
    """Compare with the entropy of the split's own token frequencies, which no model without context can beat."""
    import numpy as np

    from lit_gpt.data.token_store import ShardFile, TokenStore

    store = TokenStore.open(val)
    tokens = [ShardFile(store.path, shard, store).read(0, shard.tokens) for shard in store.shards]
    counts = np.bincount(np.concatenate(tokens))
    frequencies = counts[counts > 0] / counts.sum()
    unigram = -float((frequencies * np.log2(frequencies)).sum()) * store.tokens / store.text_bytes
    reached = float(last_validation(run)["val_bits_per_byte"])
    evidence = f"{reached:.3f} bits a byte, unigrams {unigram:.3f}: {1 - reached / unigram:.0%} below"
    return Proof("learning", reached <= (1 - MARGIN) * unigram, evidence)


def same_loss_in_transformers(run: Path, model_folder: Path, val: Path) -> Proof:
    """Run each segment of each validation row alone through transformers' LLaMA, in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from lit_gpt.data.loader import PackedDataset, validation_batches
    from lit_gpt.data.token_store import TokenStore

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    dataset = PackedDataset(TokenStore.open(val), model.config.max_position_embeddings, seed=0)  # a sum has no order
    total, targets = 0.0, 0
    with torch.inference_mode():
        for batch in validation_batches(dataset, micro_batch_size=1, rank=0, world_size=1):
            row, wanted = batch.tokens[0].long(), batch.targets[0].long()
            for start, end in itertools.pairwise(batch.cu_seqlens.unique().tolist()):
                logits = model(row[None, start:end]).logits[0]
                total += torch.nn.functional.cross_entropy(logits, wanted[start:end], reduction="sum").item()
                targets += int((wanted[start:end] >= 0).sum())
    trained, exported = float(last_validation(run)["val_loss"]), total / targets
    holds = math.isclose(trained, exported, rel_tol=LOSS_TOLERANCE)
    return Proof("export", holds, f"validation loss {trained:.6f} in the trainer, {exported:.6f} in transformers")


def last_validation(run: Path) -> dict[str, str]:
    return [row for row in metrics(run) if row["val_loss"]][-1]


# Showing


def summarise(console: Console, folder: Path, proofs: list[Proof], sentence: str, seconds: float) -> None:
    table = Table("proof", "holds", "evidence", title="What the demo proves")
    for proof in proofs:
        table.add_row(proof.name, "[green]yes" if proof.holds else "[bold red]NO", proof.evidence)
    console.print(table)
    final = last_validation(folder / "run")
    console.print(
        f"validation: loss {float(final['val_loss']):.3f}, perplexity {float(final['val_perplexity']):.1f}, "
        f"{float(final['val_bits_per_byte']):.3f} bits a byte, after {final['step']} steps"
    )
    console.print(f"the model goes on from {PROMPT!r}: {sentence.splitlines()[0]}", markup=False, soft_wrap=True)
    console.print(f"model: {folder}/model; all of it took {seconds:.0f} s")
    console.print(f"the run as a page, to open in a browser: [bold]{folder}/report.html[/]", highlight=False)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--destination_path", type=Path, default=Path("demo"), help="folder, which is emptied first (default: demo)"
    )
    parser.add_argument(
        "--source", default="auto", help="source of the text, as for fetch_german_text.py (default: auto)"
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the running program ends too
    begin, console, folder = time.monotonic(), Console(), args.destination_path
    empty_folder(folder)
    shell, run, val = Shell(folder / "logs", console), folder / "run", folder / "data/val"
    make_data(shell, folder, args.source)
    interruption = train(shell, folder)
    shell.run("verify", f"python scripts/datapoints.py verify --run_dir {run}")
    shell.run("export", f"bash scripts/create.sh {newest_checkpoint(run)} {folder}/model --dtype fp32")
    sentence = shell.run(
        "generate", f"python scripts/generate.py --model {folder}/model --prompt '{PROMPT}' --temperature 0.5"
    )
    console.print("comparing the runs, and transformers with the trainer")
    proofs = [
        same_weights(run, folder / "run-uninterrupted"),
        same_losses(interruption, run, folder / "run-uninterrupted"),
        same_rows(run, folder / "run-uninterrupted"),
        leads_back(run, folder / "corpus"),
        beats_unigrams(run, val),
        same_loss_in_transformers(run, folder / "model", val),
    ]
    shell.run("report", f"python scripts/report.py {run} --output {folder}/report.html")
    summarise(console, folder, proofs, sentence, time.monotonic() - begin)
    return 0 if all(proof.holds for proof in proofs) else 1


if __name__ == "__main__":
    run_program(main)
