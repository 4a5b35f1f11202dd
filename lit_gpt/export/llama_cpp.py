"""What llama.cpp itself makes of a GGUF file: ids of texts, and greedy continuations. Needs the package `xllamacpp`.

It runs in a process of its own, because llama.cpp ends the process on some damaged files, and it answers through the
server that the package has, on a free port of this host. The file is mapped, so tokenizing reads little more than the
vocabulary of it.
Costs: loading takes 0.1 s and, for a vocabulary of 32,000, 1 s more.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_gpt.cli import BadInput

_TIMEOUT_S = 1800
_CONTEXT_TOKENS = 512


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def version() -> str:
    """The package's version: year, month and llama.cpp's build."""
    return importlib.metadata.version("xllamacpp")


def tokenize(path: Path, texts: Sequence[str], begun: Sequence[str] = ()) -> list[list[int] | None]:
    """The ids of `texts`, control tokens spelled out in them being text; then those of `begun`, each with what the file
    says comes before a text. None where llama.cpp refuses a text; BadInput if it cannot load the file."""
    questions = [
        {"content": text, "add_special": add_special, "parse_special": False}
        for part, add_special in ((texts, False), (begun, True))
        for text in part
    ]
    return _ask(path, "/tokenize", questions)


def continue_greedily(path: Path, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int] | None]:
    """The likeliest `tokens` ids after each prompt of ids. None and BadInput as above."""
    sampling = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False, "return_tokens": True}
    questions = [{"prompt": list(prompt), "n_predict": tokens, **sampling} for prompt in prompts]
    return _ask(path, "/completion", questions)


def _ask(path: Path, endpoint: str, questions: Sequence[Mapping[str, Any]]) -> list[list[int] | None]:
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(path), endpoint],
        input=json.dumps(questions), capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines() or ["nothing"]
        raise BadInput(f"llama.cpp (xllamacpp {version()}) cannot load {path.name}: {said[-1].strip()[:300]}")
    answers: list[list[int] | None] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _serve(path: str, endpoint: str, questions: Sequence[Mapping[str, Any]]) -> list[list[int] | None]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_gpu_layers = 0
    params.n_ctx = _CONTEXT_TOKENS
    params.n_parallel = 1
    params.warmup = False
    params.no_extra_bufts = True  # which would copy the weights
    server = xllamacpp.Server(params)
    address = server.listening_address.removeprefix("http://")
    connection = http.client.HTTPConnection(address)  # urllib would ask a proxy
    answers = []
    for question in questions:
        connection.request("POST", endpoint, json.dumps(question), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        answers.append(content["tokens"] if answer.status == http.client.OK else None)
    return answers


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_serve(sys.argv[1], sys.argv[2], json.load(sys.stdin))))
    sys.stdout.flush()
    os._exit(0)  # without waiting for the server's threads
