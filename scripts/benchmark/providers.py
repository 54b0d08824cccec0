"""The implementations that are compared: torch's dot-product attention and gravity's own."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from problems import Case, Problem, visible
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gravity_hf.ops import gravity_attention

# SDPA's backends; None leaves the choice to torch. "_expanded" repeats keys and values to the
# number of query heads inside the call; "_packed" makes the query heads that share a key head one
# block of rows, which serves a single query only.
_BACKENDS = {
    "sdpa": None,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_SUFFIXES = ("", "_expanded", "_packed")
PEERS = (*(name + suffix for name in _BACKENDS for suffix in _SUFFIXES), "flex_attention")
GRAVITY = (
    "gravity_eager",
    "gravity_reference",
    "gravity_chunked",
    "gravity_flex",
    "gravity_triton",
)
PROVIDERS = (*PEERS, *GRAVITY)
DEFAULTS = {
    "cpu": ("sdpa", "gravity_eager", "gravity_reference", "gravity_chunked", "gravity_flex"),
    "cuda": (*_BACKENDS, "flex_attention", *GRAVITY),
}
FORWARD_ONLY = ("gravity_flex",)

# Float32 copies of all scores alive at the peak, measured on an H100 (reference: 4.1 and 7.2).
_COPIES = {"forward": 4.2, "backward": 7.5, "forward+backward": 7.5}


def attend(provider: str, problem: Problem) -> Tensor:
    """The output `[B, H, Tq, D]` of one call."""
    if provider == "flex_attention":
        return _flex_attention(problem)
    if provider == "gravity_eager":
        return _eager_gravity(problem)
    if provider in GRAVITY:
        return gravity_attention(
            problem.q,
            problem.k,
            problem.v,
            problem.mass,
            eps=problem.eps,
            law=problem.law,
            key_radius_sq=problem.key_radius_sq,
            causal=problem.shape.causal,
            impl=provider.removeprefix("gravity_"),
        )
    return _sdpa(problem, _arrangement(provider))


def prepare(case: Case, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed. "backward" keeps the graph of one forward call and differentiates it."""
    if case.work == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(case.provider, problem),)

        return forward
    leaves = [x.requires_grad_() for x in problem.leaves()]
    if case.work == "backward":
        output = attend(case.provider, problem)
        return lambda: torch.autograd.grad(output, leaves, problem.cotangent, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        output = attend(case.provider, problem)
        return (output, *torch.autograd.grad(output, leaves, problem.cotangent))

    return both


def backend_of(provider: str) -> contextlib.AbstractContextManager[None]:
    """Holds SDPA to a backend. Entered outside of the timed part: it is host work."""
    backend = None
    if provider.startswith("sdpa"):
        backend = _BACKENDS[provider.removesuffix(_arrangement(provider))]
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def chosen_backend(provider: str, problem: Problem) -> str:
    """Which backend torch takes where the choice is torch's; "" where it is not."""
    if not provider.startswith("sdpa") or provider.removesuffix(_arrangement(provider)) != "sdpa":
        return ""
    q, k, v, options = _sdpa_arguments(problem, _arrangement(provider))
    options["attn_mask"] = options.pop("attn_mask", None)
    names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
    try:
        return names.get(torch._fused_sdp_choice(q, k, v, **options), "unknown")
    except (AttributeError, RuntimeError, TypeError):  # private: it may change
        return "unknown"


def score_bytes(case: Case, device: str) -> float:
    """Bytes that a provider which holds all scores needs for them; 0 for the others."""
    holds = case.provider in ("gravity_eager", "gravity_reference")
    holds |= device == "cpu" and "flex" in case.provider
    shape = case.shape
    scores = shape.batch * shape.heads * shape.queries * shape.keys
    return 4 * scores * _COPIES[case.work] if holds else 0


def triton_interpreter() -> bool:
    """Whether Triton kernels run on a CPU in this process."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and os.environ.get("TRITON_INTERPRET") == "1"


def _arrangement(provider: str) -> str:
    return next((suffix for suffix in _SUFFIXES[1:] if provider.endswith(suffix)), "")


def _sdpa(problem: Problem, arrangement: str) -> Tensor:
    q, k, v, options = _sdpa_arguments(problem, arrangement)
    return F.scaled_dot_product_attention(q, k, v, **options).view_as(problem.cotangent)


def _sdpa_arguments(problem: Problem, arrangement: str) -> tuple[Tensor, Tensor, Tensor, dict]:
    shape, q, k, v = problem.shape, problem.q, problem.k, problem.v
    groups = shape.heads // shape.kv_heads
    if arrangement == "_expanded":
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if arrangement == "_packed":
        if shape.queries != 1:
            raise ValueError(f"packed queries: expected one query per call, got {shape.queries}")
        q = q.view(shape.batch, shape.kv_heads, groups, shape.width)
    options = {"enable_gqa": q.shape[1] != k.shape[1], "is_causal": False}
    if shape.causal and shape.queries == shape.keys:
        options["is_causal"] = True
    elif shape.causal and shape.queries > 1:
        # Torch's flag is aligned at the first key.
        options["attn_mask"] = visible(shape.queries, shape.keys, q.device)
    return q, k, v, options


def _eager_gravity(problem: Problem) -> Tensor:
    """As a model's author writes it: products in the dtype of the inputs, softmax in float32."""
    shape = problem.shape
    groups = shape.heads // shape.kv_heads
    k, v = (x.repeat_interleave(groups, 1) for x in (problem.k, problem.v))
    if problem.key_radius_sq is None:
        key_term = k.float().square().sum(-1)[:, :, None]
    else:
        key_term = problem.key_radius_sq.repeat_interleave(groups)[:, None, None]
    query_term = problem.q.float().square().sum(-1, keepdim=True)
    distance_sq = (query_term + key_term - 2 * (problem.q @ k.mT)).clamp(min=0)
    strength, softened = (
        problem.mass.square()[:, None, None],
        distance_sq + problem.eps[:, None, None],
    )
    score = strength / softened if problem.law == "force" else -strength * softened.log()
    if shape.causal and shape.queries > 1:
        score = score.masked_fill(~visible(shape.queries, shape.keys, k.device), -torch.inf)
    return score.softmax(-1).to(v.dtype) @ v


def _flex_attention(problem: Problem) -> Tensor:
    q, k = problem.q, problem.k
    blocks = None
    if problem.shape.causal and q.shape[2] > 1:
        blocks = _causal_blocks(q.shape[2], k.shape[2], q.device)
    run = _flex_runner(q.device.type)
    return run(q, k, problem.v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _flex_runner(device_type: str) -> Callable[..., Tensor]:
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cpu":
        return flex_attention
    # One graph is differentiated many times, and every shape is compiled for itself; past the
    # default limit of 8 shapes torch would go on uncompiled.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=1)
def _causal_blocks(queries: int, keys: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    shift = keys - queries

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + shift

    return create_block_mask(seen, None, None, queries, keys, device=device)
