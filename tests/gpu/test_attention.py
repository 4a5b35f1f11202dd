"""Every attention backend of this GPU, compared with SDPA with a mask in fp32: forward, backward, no graph break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.model.attention import BACKENDS, attention, choose_backend, make_segments
from lit_gpt.model.gpt import GPT, initialize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS, TOKENS = 4, 512
LENGTHS = (1, 511, 200, 300, 12, 512, 100, 57, 355)  # each row's documents end at its edge


def available(backend: str) -> str:
    try:
        return choose_backend(backend, torch.device("cuda"), torch.bfloat16)
    except BadInput as error:
        pytest.skip(str(error))


def packed() -> Tensor:
    """Segment starts of ROWS rows, with empty segments at the end as batches have them."""
    edges = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    assert edges[-1] == ROWS * TOKENS
    return torch.cat((edges, edges[-1:].repeat(6))).to(device="cuda", dtype=torch.int32)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "groups", "size"), [(12, 4, 64), (32, 4, 64), (8, 8, 128)])
@pytest.mark.parametrize("documents", [False, True])
def test_against_fp32(backend: str, heads: int, groups: int, size: int, documents: bool) -> None:
    """bf16 has 8 bits: outputs and gradients of a correct kernel lie within 1 % of fp32 on the same inputs."""
    backend = available(backend)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(ROWS, TOKENS, n, size) for n in (heads, groups, groups, heads)]
    q, k, v, d_out = (torch.randn(s, device="cuda", generator=generator).bfloat16() for s in shapes)
    cu_seqlens = packed() if documents else None
    results = []
    for dtype, chosen in ((torch.bfloat16, backend), (torch.float32, "torch")):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        segments = make_segments(cu_seqlens, ROWS, TOKENS, q.device, dtype, chosen)
        out = attention(*inputs, segments, chosen)
        results.append((out, *torch.autograd.grad(out, inputs, d_out.to(dtype))))
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert relative(got, wanted) < 1e-2, name


def test_auto_in_fp32_runs() -> None:
    chosen = choose_backend("auto", torch.device("cuda"), torch.float32)
    q, k, v = (torch.randn(1, 64, n, 64, device="cuda", requires_grad=True) for n in (8, 4, 4))
    segments = make_segments(None, 1, 64, q.device, torch.float32, chosen)
    attention(q, k, v, segments, chosen).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("backend", ["fa3", "fa4", "torch"])
def test_compiled_blocks_stay_whole(backend: str) -> None:
    """fullgraph=True refuses a graph break; cu_seqlens of another length does not compile again."""
    backend = available(backend)
    # heads of the 120M model, for which test_against_fp32 has compiled fa4's kernels in this process
    config = Config.from_name("debug", n_embd=768, n_head=12, n_query_groups=4, block_size=TOKENS)
    with torch.device("cuda"):
        model = GPT(config, attention_backend=backend, compute_dtype=torch.bfloat16)
    initialize(model, seed=1)
    tokens = torch.randint(0, 4096, (ROWS, TOKENS), device="cuda")
    targets = tokens.roll(-1, 1)
    plain = model(tokens, packed(), targets)
    torch._dynamo.reset()
    for block in model.transformer.h:
        block.compile(fullgraph=True)
    losses = []
    for extra in (0, 16, 48):
        cu_seqlens = torch.cat((packed(), packed()[-1:].repeat(extra)))
        losses.append(model(tokens, cu_seqlens, targets))
        losses[-1].backward()
        if extra == 16:
            torch._dynamo.config.error_on_recompile = True  # one more compilation made the length dynamic
    torch._dynamo.config.error_on_recompile = False
    for loss in losses:
        assert relative(loss, plain) < 1e-3
