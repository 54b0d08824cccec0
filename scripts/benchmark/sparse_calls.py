"""The calls that `sparse_attention.py` times: one layer on random tensors, or a whole host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from gravity_hf import (
    GravityConfig,
    KeyBudget,
    ScreenedCache,
    gravity_attention,
    patch_with_gravity,
    sparsify_attention,
)
from gravity_hf.ops.sparse import DotProduct, Gravity, block_means, sparse_attention

Call = Callable[[], tuple[Tensor, ...]]
WINDOW, SINKS = 64, 4
SCREEN_DIM = 16
_MASS, _SOFTENING = 1.5, 8.0
_VOCABULARY = 256


@dataclass(frozen=True)
class Case:
    """What is computed, at one shape.

    Attributes:
        level: `layer`, attention alone on tensors; or `host`, a whole Llama, without its head but
            for the last token.
        work: `prefill`, so many tokens at once; `decode`, one more after so many; `step`, a
            prefill and its gradients.
        launch: `eager`, or a replay of a CUDA `graph`: what the device takes, without the time of
            Python and of the driver.
        law: `dot` products, or `gravity` (the power law, euclidean).
    """

    level: str
    work: str
    law: str
    length: int
    batch: int
    heads: int
    kv_heads: int
    width: int
    dtype: str
    launch: str = "eager"


@dataclass(frozen=True)
class Subject:
    """Who computes it.

    Attributes:
        kind: `dense`: SDPA, or the operator of gravity; `sparse`.
        top_k, block_size: of its budget; None for dense.
        screen: `keys` themselves or `projected` to 16 numbers; None for dense.
        cache: of a decoding step: `dynamic`, transformers' own, or `screened`, which keeps means of
            blocks. Of a layer no cache is copied: `screened` alone has the means at hand.
        impl: of the sparse operator.
    """

    kind: str
    top_k: int | None = None
    block_size: int | None = None
    screen: str | None = None
    cache: str | None = None
    impl: str | None = None

    @property
    def budget(self) -> KeyBudget:
        window = min(WINDOW, self.top_k // 2)
        return KeyBudget(self.top_k, self.block_size, window, SINKS)


def prepare(case: Case, subject: Subject, device: str) -> Call:
    """The call, with everything made that is no part of it."""
    torch.manual_seed(0)
    make = _layer if case.level == "layer" else _host
    return make(case, subject, device)


def _layer(case: Case, subject: Subject, device: str) -> Call:
    queries = 1 if case.work == "decode" else case.length
    dtype, step = getattr(torch, case.dtype), case.work == "step"

    def drawn(heads: int, tokens: int) -> Tensor:
        shape = (case.batch, heads, tokens, case.width)
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=step)

    q, k = drawn(case.heads, queries), drawn(case.kv_heads, case.length)
    v = drawn(case.kv_heads, case.length)
    attend = _dense_layer(case, q, k, v) if subject.kind == "dense" else None
    attend = attend or _sparse_layer(case, subject, q, k, v)

    def forward() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (attend(),)

    def training_step() -> tuple[Tensor, ...]:
        output = attend()
        return torch.autograd.grad(output, (q, k, v), output.detach())

    return training_step if step else forward


def _dense_layer(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    causal = q.shape[2] > 1
    if case.law == "dot":
        options: dict[str, Any] = {"is_causal": causal, "enable_gqa": case.heads != case.kv_heads}
        return lambda: F.scaled_dot_product_attention(q, k, v, **options)
    mass, softening = _terms(case, q)
    return lambda: gravity_attention(q, k, v, mass, eps=softening, law="power", causal=causal)


def _sparse_layer(
    case: Case, subject: Subject, q: Tensor, k: Tensor, v: Tensor
) -> Callable[[], Tensor]:
    score: Any = DotProduct(case.width**-0.5)
    if case.law == "gravity":
        score = Gravity(*_terms(case, q), law="power")
    screen_dim = SCREEN_DIM if subject.screen == "projected" else case.width
    project = torch.linalg.qr(torch.randn(case.width, case.width))[0][:, :screen_dim].to(q)
    projected = subject.screen == "projected"
    options: dict[str, Any] = {"score": score, "budget": subject.budget}
    kept = (k.detach() @ project) if projected else k.detach()
    if subject.cache == "screened":
        options["means"] = block_means(kept, subject.budget.block_size)

    def attend() -> Tensor:
        screen = None
        if projected:
            # A cache keeps the projections of all keys but the newest.
            keys = kept if subject.cache == "screened" else k.detach() @ project
            screen = (q.detach() @ project, keys)
        return sparse_attention(q, k, v, screen=screen, impl=subject.impl or "auto", **options)

    return attend


def _terms(case: Case, like: Tensor) -> tuple[Tensor, Tensor]:
    """Masses and softenings `[H]`, float32."""
    mass = torch.full((case.heads,), _MASS, device=like.device)
    return mass, torch.full_like(mass, _SOFTENING)


def _host(case: Case, subject: Subject, device: str) -> Call:
    model = host_model(case, device)
    if subject.kind == "sparse":
        screening = "learned" if subject.screen == "projected" else "keys"
        sparsify_attention(model, subject.budget, screening=screening, screen_dim=SCREEN_DIM)
    ids = torch.randint(_VOCABULARY, (case.batch, case.length), device=device)
    if case.work == "prefill":

        def prefill() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (model(ids, use_cache=False, logits_to_keep=1).logits,)

        return prefill
    cache = ScreenedCache(model) if subject.cache == "screened" else DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, :1]

    def decode() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            logits = model(token, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return (logits,)

    return decode


# Of the host: hidden size over heads times width is 1, and as many layers as the trained ones have.
_LAYERS = {"cpu": 4, "cuda": 8}


def host_model(case: Case, device: str) -> LlamaForCausalLM:
    """A Llama with random weights, under gravity where the law says so."""
    hidden = case.heads * case.width
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=_LAYERS[device],
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.width,
        max_position_embeddings=2 * case.length,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, case.dtype)).eval()
    return patch_with_gravity(model, GravityConfig(law="power")) if case.law == "gravity" else model
