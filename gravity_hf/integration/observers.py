"""What calibration sees of one attention module: running statistics, no stored activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.parameters import GravityTerms
from ..ops.precision import exact_products
from ..ops.reference import (
    gravity_score,
    neutral_distance,
    soft_capped,
    split_mask,
    squared_distance,
)
from .attention import AttentionCall

# Elements of one score block; bounds the memory of calibration, not its result.
_BLOCK_ELEMENTS = 1 << 22
_HISTOGRAM_BINS = 1 << 14


class View(NamedTuple):
    """One call of an attention module, in float32.

    `q` `[B, Hkv, G, Tq, D]`; `k` `[B, Hkv, Tk, D]`; `allowed` bool `[B, 1|H, Tq, Tk]`; `bias`
    `[B|1, H|1, Tq, Tk]` where the host adds more to the scores than hidden keys; `softcap` on them.
    A sink is one more key, the last: at the origin, its logit in `bias`. `keys` counts without it.
    """

    q: Tensor
    k: Tensor
    allowed: Tensor
    bias: Tensor | None
    softcap: float | None
    keys: int


class Observer(ABC):
    """Base of the calibration passes: shown every q and k that an attention module attends with.

    The module itself goes on with the host's dot product, so that what later modules are shown
    does not depend on the masses that are being measured.
    """

    def __init__(self) -> None:
        self.calls = 0
        # `[B, T]` bool of the batch being run; rows of padding teach nothing. None: all count.
        self.real_tokens: Tensor | None = None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.look(call)
        return call.dot_product()

    def look(self, call: AttentionCall) -> None:
        """`see` of a call, with all that the host adds to plain attention."""
        host = call.host_terms
        _ = call.terms  # which refuses heads that the masses were not made for
        self.see(
            call.query,
            call.key,
            host.folded_mask,
            call.scaling,
            softcap=host.softcap,
            sinks=host.sinks,
        )

    def see(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        batch, heads, queries, width = query.shape
        kv_heads, keys = key.shape[1], key.shape[2]
        allowed, bias = _read_mask(mask, batch, queries, keys, query.device)
        if self.real_tokens is not None and self.real_tokens.shape == (batch, queries):
            allowed = allowed & self.real_tokens.to(allowed.device)[:, None, :, None]
        q = query.detach().float().reshape(batch, kv_heads, heads // kv_heads, queries, width)
        view = View(q, key.detach().float(), allowed, bias, softcap, keys)
        if sinks is not None:
            view = _with_sink(view, sinks.detach().float())
        self.calls += 1
        # A model prepared for half-precision training runs under autocast.
        with exact_products(query.device):
            self.update(view, scaling if scaling else width**-0.5)

    @abstractmethod
    def update(self, view: View, scaling: float) -> None:
        """Add one call of the attention module to the running statistics."""


def _read_mask(
    mask: Tensor | None, batch: int, queries: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """`allowed` and `bias` of a view."""
    allowed = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if mask is None:
        return allowed, None
    visible, bias = split_mask(mask.detach().to(device))
    bias = None if bias is None else bias.masked_fill(~visible, 0.0).float()
    bias = bias if bias is not None and bias.any() else None
    if visible.shape[1] > 1 and bool((visible == visible[:, :1]).all()):
        visible = visible[:, :1]
    return allowed & visible, None if bias is None else bias.expand(*bias.shape[:2], queries, keys)


def _with_sink(view: View, sinks: Tensor) -> View:
    """`sinks` `[H]` or `[B, H, Tq]`. A row that sees nothing else teaches nothing by its sink."""
    k = torch.cat([view.k, torch.zeros_like(view.k[:, :, :1])], 2)
    allowed = torch.cat([view.allowed, view.allowed.any(-1, keepdim=True)], -1)
    logit = (sinks[None, :, None] if sinks.dim() == 1 else sinks).unsqueeze(-1)
    batch, kv_heads, groups, queries, _ = view.q.shape
    bias = logit.new_zeros(1, 1, 1, 1) if view.bias is None else view.bias
    most = max(logit.shape[0], bias.shape[0])
    parts = (
        bias.expand(most, kv_heads * groups, queries, view.keys),
        logit.expand(most, kv_heads * groups, queries, 1),
    )
    return view._replace(k=k, allowed=allowed, bias=torch.cat(parts, -1))


class Moments(Observer):
    """First pass, per head: where the host's own attention falls, and the longest key and query.

    Sums in float64, one term per query row: `dot` and `attended_key_sq` are means over that row's
    keys under the host's attention weights, `query_sq` is the query's own; `key_sq` has one term
    per visible key. `[H]`, except `key_sq` `[Hkv]`. `queries` and `keys` count the terms: `[1]`, or
    of the same shapes where heads see different keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries = self.keys = torch.zeros(1, dtype=torch.float64)
        self.scaling = 0.0
        self.sums: dict[str, Tensor] = {}
        self.longest_key_sq = self.longest_query_sq = torch.zeros(())

    def update(self, view: View, scaling: float) -> None:
        self.scaling = scaling
        rows, columns = view.allowed.any(-1), view.allowed[..., : view.keys].any(-2)
        query_sq = view.q.square().sum(-1).flatten(1, 2) * rows
        if columns.shape[1] > 1:  # a key head counts where one of its query heads sees
            columns = columns.unflatten(1, (view.k.shape[1], -1)).any(2)
        key_sq = view.k[:, :, : view.keys].square().sum(-1) * columns
        self._add("query_sq", total(query_sq, (0, 2)))
        self._add("key_sq", total(key_sq, (0, 2)))
        self.queries = self.queries + count(rows)
        self.keys = self.keys + count(columns)
        self.longest_query_sq = _longest(self.longest_query_sq, query_sq)
        self.longest_key_sq = _longest(self.longest_key_sq, key_sq)

        keys = view.k.repeat_interleave(view.q.shape[2], 1)
        attended_sq = keys.square().sum(-1)[:, :, None]
        for q, allowed, bias in row_blocks(view):
            dot = q @ keys.transpose(-2, -1)
            score = capped(scaling * dot, view.softcap) + bias
            weights = score.masked_fill(~allowed, torch.finfo(dot.dtype).min).softmax(-1)
            weights = weights.masked_fill(~allowed, 0.0)
            self._add("dot", total(weights * dot, (0, 2, 3)))
            self._add("attended_key_sq", total(weights * attended_sq, (0, 2, 3)))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


class Agreement(Observer):
    """Second pass, per query head: KL from the host's attention to gravity's, and the contrast.

    Contrast is `((d2_95 + eps) / (d2_05 + eps))^2` over attended pairs, sinks aside: the softened
    squared distance of a far key over that of a near one, squared; under the law "force" the score
    falls by so much more steeply at the near one. 1 means that distance makes no difference.
    """

    def __init__(self, terms: GravityTerms, law: str, reach_sq: Tensor) -> None:
        super().__init__()
        self.terms, self.law, self.reach_sq = terms, law, reach_sq
        self.rows = torch.zeros(1, dtype=torch.float64)
        heads = terms.mass.shape[0]
        self.kl_sum = torch.zeros(heads, dtype=torch.float64)
        self.histogram = torch.zeros(heads, _HISTOGRAM_BINS, dtype=torch.float64)

    def update(self, view: View, scaling: float) -> None:
        groups = view.q.shape[2]
        keys = view.k.repeat_interleave(groups, 1)
        radius = self.terms.key_radius_sq
        radius = None if radius is None else radius.to(keys.device).repeat_interleave(groups)
        mass, softening = (t.to(keys.device) for t in (self.terms.mass, self.terms.softening))
        for q, allowed, bias in row_blocks(view):
            distance_sq = squared_distance(q, keys, radius)
            gravity = gravity_score(distance_sq, mass, softening, self.law)
            if view.softcap is not None:
                neutral_sq = neutral_distance(q, keys, radius)
                neutral = gravity_score(neutral_sq, mass, softening, self.law)
                gravity = soft_capped(gravity, neutral, view.softcap)
            host = capped(scaling * (q @ keys.transpose(-2, -1)), view.softcap)
            self._add_divergence(host + bias, gravity + bias, allowed)
            self._add_distances(distance_sq[..., : view.keys], allowed[..., : view.keys])

    def _add_divergence(self, host: Tensor, gravity: Tensor, allowed: Tensor) -> None:
        lowest = torch.finfo(host.dtype).min
        log_host = host.masked_fill(~allowed, lowest).log_softmax(-1)
        log_gravity = gravity.masked_fill(~allowed, lowest).log_softmax(-1)
        terms = (log_host.exp() * (log_host - log_gravity)).masked_fill(~allowed, 0.0)
        self.kl_sum += total(terms.sum(-1), (0, 2)).cpu()
        self.rows = self.rows + count(allowed.any(-1))

    def _add_distances(self, distance_sq: Tensor, allowed: Tensor) -> None:
        scale = _HISTOGRAM_BINS / self.reach_sq.clamp(min=1e-30).to(distance_sq)
        bins = (distance_sq * scale[:, None, None]).long().clamp(0, _HISTOGRAM_BINS - 1)
        allowed = allowed.expand(-1, bins.shape[1], -1, -1)
        for head in range(bins.shape[1]):
            counts = torch.bincount(bins[:, head][allowed[:, head]], minlength=_HISTOGRAM_BINS)
            self.histogram[head] += counts.double().cpu()

    def divergence(self) -> Tensor:
        """Mean over query rows of KL(host || gravity), nats, `[H]`."""
        # Equal distributions may come out below 0 by rounding.
        return (self.kl_sum / self.rows.clamp(min=1)).clamp(min=0.0)

    def contrast(self) -> Tensor:
        """`[H]`, at least 1."""
        near, far = self.quantile(0.05), self.quantile(0.95)
        softening = self.terms.softening.double().cpu()
        return ((far + softening) / (near + softening)).square()

    def quantile(self, fraction: float) -> Tensor:
        cumulative = self.histogram.cumsum(-1)
        target = fraction * cumulative[:, -1:]
        bin_ = torch.searchsorted(cumulative, target).clamp(max=_HISTOGRAM_BINS - 1)
        inside = self.histogram.gather(-1, bin_)
        before = cumulative.gather(-1, bin_) - inside
        position = bin_ + ((target - before) / inside.clamp(min=1.0)).clamp(0.0, 1.0)
        return position.squeeze(-1) * self.reach_sq.double().cpu() / _HISTOGRAM_BINS


def row_blocks(view: View) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
    """Blocks of rows: `q` `[B, H, rows, D]`, `allowed` `[B, 1|H, rows, Tk]` and the bias."""
    batch, kv_heads, groups, queries, width = view.q.shape
    q = view.q.reshape(batch, kv_heads * groups, queries, width)
    per_row = batch * kv_heads * groups * view.k.shape[2]
    rows = max(1, _BLOCK_ELEMENTS // max(per_row, 1))
    for start in range(0, queries, rows):
        part = slice(start, start + rows)
        bias = 0.0 if view.bias is None else view.bias[:, :, part]
        yield q[:, :, part], view.allowed[:, :, part], bias


def total(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.sum(dims, dtype=torch.float64)


def count(seen: Tensor) -> Tensor:
    """How many of bool `[B, heads, T]`, per head, on the CPU."""
    return total(seen, (0, 2)).cpu()


def capped(score: Tensor, softcap: float | None) -> Tensor:
    """A host's logits under its cap."""
    return score if softcap is None else softcap * torch.tanh(score / softcap)


def _longest(so_far: Tensor, lengths_sq: Tensor) -> Tensor:
    """Per head: `lengths_sq` `[B, heads, T]`."""
    return torch.maximum(so_far.to(lengths_sq.device), lengths_sq.amax((0, 2)).double())
