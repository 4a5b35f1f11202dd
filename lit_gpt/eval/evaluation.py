"""What an exported folder scores: loss on a validation split, and tasks of lm-eval.

The loss is that of training: our model with the folder's weights, the same rows, no attention across documents (unless
asked for), the same sum. So for weights in fp32 it equals the run's own validation loss. Tasks run through transformers
and lm-eval, as anybody would evaluate the published folder.
Costs: the weights in memory, for the loss in fp32.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_gpt.cli import BadInput, say_loading
from lit_gpt.data.loader import Batch, PackedDataset
from lit_gpt.data.token_store import TokenStore
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export.hf_folder import HFWeights
from lit_gpt.export.hf_weights import config_from_hf, to_lit
from lit_gpt.files import read_json
from lit_gpt.model.gpt import GPT
from lit_gpt.train.validation import Validation, validate

log = logging.getLogger(__name__)

TELL_S = 10.0


class Score(NamedTuple):
    """One metric of a task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    """Standard error; None where lm-eval gives none."""


def folder_loss(
    folder: Path,
    store: TokenStore,
    device: torch.device,
    *,
    micro_batch_size: int,
    max_rows: int | None,
    cross_document_attention: bool,
) -> Validation:
    """Loss of the folder's model on the first `max_rows` rows (None: all) of `store`.

    Raises BadInput if the folder is not of a model that we train, or if its tokenizer is not the store's.
    """
    fields = read_json(folder / "config.json")
    _require_vocabulary(Tokenizer.from_folder(folder), folder, store)
    config = config_from_hf(fields, model_name=None, vocab_size=store.vocab_size)
    weights = HFWeights(folder)
    with torch.device("meta"):
        model = GPT(config)
    state = {
        name: tensor.to(device, torch.float32)
        for name, tensor in to_lit(config, weights.names, weights.read, fields["vocab_size"])
    }
    model.load_state_dict(state, assign=True)
    model.eval()
    # to_lit adds padding rows, which have no token: drop those that the folder leaves out.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[: fields["vocab_size"]], requires_grad=False)

    def loss(batch: Batch) -> Tensor:
        tokens, targets, cu_seqlens = (x.to(device) for x in (batch.tokens, batch.targets, batch.cu_seqlens))
        return model(tokens.long(), cu_seqlens, targets.long())

    rows = PackedDataset(store, config.block_size, seed=0, cross_document_attention=cross_document_attention)
    count = min(rows.rows_per_epoch, max_rows or rows.rows_per_epoch)
    return validate(
        loss, rows, store, micro_batch_size=micro_batch_size, max_rows=max_rows, device=device,
        before_batch=_progress(count, micro_batch_size),
    )  # fmt: skip


def _progress(rows: int, micro_batch_size: int) -> Callable[[], None]:
    """What is called before each batch: it logs a line every TELL_S."""
    log.info("measuring the loss on %s rows", f"{rows:,}")
    begun = time.monotonic()
    told, done = begun, 0

    def before_batch() -> None:
        nonlocal told, done
        now = time.monotonic()
        if done and now - told >= TELL_S:
            told = now
            left = timedelta(seconds=int((now - begun) / done * (rows - done)))
            log.info("loss: %s of %s rows, %s left", f"{done:,}", f"{rows:,}", left)
        done += micro_batch_size

    return before_batch


def _require_vocabulary(tokenizer: Tokenizer, folder: Path, store: TokenStore) -> None:
    """Compare vocabulary size and EOS: the export writes new tokenizer files, so the fingerprint differs anyway."""
    found, made_with = (tokenizer.vocab_size, tokenizer.eos_id), (store.vocab_size, store.eos_id)
    if found != made_with:
        raise BadInput(
            f"{store.path} was made with another tokenizer than that of {folder}: "
            f"a vocabulary of {made_with[0]} ids with EOS {made_with[1]}, not of {found[0]} with EOS {found[1]}"
        )


def task_scores(
    folder: Path,
    tasks: Sequence[str],
    task_dir: Path | None,
    device: torch.device,
    *,
    batch_size: int,
    limit: int | None,
) -> list[Score]:
    """The scores of lm-eval's tasks, including those in `task_dir`, computed in the type of the stored weights.

    limit: items per task (None: all). Raises BadInput if a task is unknown or its data is not available.
    """
    say_loading(folder, "lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)  # its bars say enough
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_dir), include_defaults=False) if task_dir else TaskManager()
    if task_dir and not set(tasks) <= set(manager.all_tasks):  # finding lm-eval's own tasks takes 20 s
        manager = TaskManager(include_path=str(task_dir))
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=5)
            hint = f"near it: {', '.join(near)}" if near else "lm-eval ls tasks lists lm-eval's own"
            where = f"no task of lm-eval{f' or of {task_dir}' if task_dir else ''}"
            raise BadInput(f"--tasks {task}: {where} ({hint})")
    model = _language_model(folder, device, batch_size)
    try:
        results = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    except OSError as error:  # the data set is not in the cache and the machine is offline, or it is not on the Hub
        raise BadInput(f"--tasks {' '.join(tasks)}: the data is not available: {str(error).splitlines()[0]}") from None
    return [score for task, values in results["results"].items() for score in _scores(task, values)]


def _language_model(folder: Path, device: torch.device, batch_size: int) -> Any:
    """The folder as lm-eval's model; a whole text's likelihood (perplexity, bits per byte) is that after one BOS.

    lm-eval (0.4.13) puts BOS before the text and lets the tokenizer add a second one (lm-evaluation-harness#3333).
    """
    from lm_eval.models.huggingface import HFLM

    class OneBos(HFLM):
        add_bos_token: bool | None

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            before = self.add_bos_token
            self.add_bos_token = False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.add_bos_token = before

    return OneBos(pretrained=str(folder), device=str(device), dtype="auto", batch_size=batch_size)


def _scores(task: str, values: dict[str, Any]) -> list[Score]:
    """lm-eval's keys are metric and filter: "acc,none", and "acc_stderr,none" for its standard error."""
    scores = []
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else key
        scores.append(Score(task, name, float(value), float(stderr) if isinstance(stderr, float | int) else None))
    return scores
