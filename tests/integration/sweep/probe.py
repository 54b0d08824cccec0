"""Every attention call of a patched model, compared with the float64 reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gravity_hf.integration.arguments import terms_of_call
from gravity_hf.integration.attention import AttentionCall
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.integration.masks import ordinary
from gravity_hf.integration.support import CAUSAL_IN_NAME_ONLY
from gravity_hf.layers.parameters import GravityTerms
from gravity_hf.ops.reference import gravity_attention_reference, split_mask

# An implementation may err this many times as much as the float32 reference does.
FACTOR = 4.0
# How many neighbours of its inputs say how well a gradient is conditioned.
JITTERS, MORE_JITTERS = 2, 32


class Probe:
    """Observer of one attention module: gravity flows on as it is, and every call is compared.

    Attributes:
        calls: how often the module attended by gravity.
        error: the worst error of an output, in units of its budget.
        choice: whether some query saw more than one key; else attention has nothing to decide.
        detached: whether an output had no gradient where gradients were wanted.
    """

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.error = name, 0, 0.0
        self.choice = self.detached = False
        self._kept: list[tuple[AttentionCall, Tensor]] = []
        self._gradients: dict[int, Tensor] = {}

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        output, weights = call.gravity()
        self.calls += 1
        with torch.no_grad():
            exact, rounded = (expected(call, call.terms, x) for x in (torch.float64, torch.float32))
            self.error = max(self.error, in_budgets(output, exact, rounded))
            self.choice |= _has_choice(call)
        if output.requires_grad:
            index = len(self._kept)
            self._kept.append((call, output))
            output.register_hook(lambda gradient: self._gradients.__setitem__(index, gradient))
        elif torch.is_grad_enabled():
            self.detached = True
        return output, weights

    def mass_gradient(self, dtype: torch.dtype, jitter: int | None = None) -> Tensor:
        """The reference's gradient of `mass_log`, from the gradients that reached the outputs.

        With `jitter`, a seed, it is that of neighbours: inputs and gradients moved at random by one
        rounding of float32 at most. The gradient is a sum in which far more may cancel than is
        left; by how much the neighbours differ is what no float32 arithmetic can know.
        """
        mass_log = self._kept[0][0].module.gravity.mass_log
        total = torch.zeros_like(mass_log, dtype=torch.float64)
        for index, gradient in self._gradients.items():
            call, gradient = self._kept[index][0], gradient.to(dtype)
            if jitter is not None:
                generator = torch.Generator().manual_seed(jitter)
                call, gradient = _neighbour(call, generator), _moved(gradient, generator)
            output = expected(call, call.module.gravity(), dtype)
            (term,) = torch.autograd.grad((output * gradient).sum(), mass_log)
            total += term.double()
        return total

    @property
    def has_gradient(self) -> bool:
        """Whether any gradient came back to the module's output."""
        return any(bool(gradient.any()) for gradient in self._gradients.values())


@contextmanager
def probing(model: nn.Module) -> Iterator[dict[str, Probe]]:
    """Probes on all gravity modules, by the name of the attention module."""
    modules = gravity_modules(model)
    probes = {name: Probe(name) for name in modules}
    for name, gravity in modules.items():
        gravity.observer = probes[name]
    try:
        yield probes
    finally:
        for gravity in modules.values():
            gravity.observer = None


def expected(call: AttentionCall, terms: GravityTerms, dtype: torch.dtype) -> Tensor:
    """`[B, Tq, H, Dv]`: the reference at the call's q, k, v, mask and arguments."""
    options: dict[str, Any] = {
        "softcap": call.arguments.get("softcap"),
        "sinks": _sinks(call.arguments, dtype),
    }
    radius, value = terms.key_radius_sq, call.value.detach().to(dtype)
    result = gravity_attention_reference(
        call.query.detach().to(dtype),
        call.key.detach().to(dtype),
        value,
        terms.mass.to(dtype),
        eps=terms.softening.to(dtype),
        law=call.config.law,
        key_radius_sq=None if radius is None else radius.to(dtype),
        mask=_mask(call),
        **{name: option for name, option in options.items() if option is not None},
    )
    head_mask = call.arguments.get("head_mask")
    if head_mask is None:
        return result.output.transpose(1, 2)
    groups = call.query.shape[1] // value.shape[1]
    weights = result.weights * (head_mask[:, None, None] if head_mask.dim() == 1 else head_mask)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def _neighbour(call: AttentionCall, generator: torch.Generator) -> AttentionCall:
    q, k, v = (_moved(x.detach().double(), generator) for x in (call.query, call.key, call.value))
    return dataclasses.replace(call, query=q, key=k, value=v)


def _moved(exact: Tensor, generator: torch.Generator) -> Tensor:
    noise = 2.0 * torch.rand(exact.shape, generator=generator, dtype=exact.dtype) - 1.0
    return exact * (1.0 + 0.5 * torch.finfo(torch.float32).eps * noise)


def in_budgets(actual: Tensor, exact: Tensor, rounded: Tensor, *nearby: Tensor) -> float:
    """The error of `actual` in units of its budget: `FACTOR` times the error of the same formula in
    float32, or what it moves by under rounded inputs (`nearby`), plus one rounding unit."""
    if not exact.numel():
        return 0.0
    if actual.shape != exact.shape or not actual.isfinite().all():
        return float("inf")
    exact = exact.double()
    unit = torch.finfo(torch.float32).eps * exact.abs().max()
    errors = [(other.double() - exact).abs().max() for other in (rounded, *nearby)]
    budget = FACTOR * (max(errors) + unit)
    error = (actual.double() - exact).abs().max()
    return 0.0 if error == 0 else (error / budget).item()


def _mask(call: AttentionCall) -> Tensor | None:
    """The call's mask, with a position bias in it and without the keys that an indexer left out."""
    mask = ordinary(call.mask)
    if mask is None and _is_causal(call):
        mask = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool).tril()
        mask = mask[None, None]
    if mask is not None and mask.dim() == 2:  # raw padding, not 0 = real
        mask = (mask != 0)[:, None, None]
    bias, indices = call.arguments.get("position_bias"), call.arguments.get("indices")
    if call.arguments.get("block_indices") is not None:
        # Only the module's own indexer knows its blocks; `converges` compares them with the host's.
        mask = terms_of_call(call.module, call.query, call.key, call.mask, call.arguments).mask
    if bias is not None:
        mask = _biased(mask, bias.detach().float())
    if indices is not None and indices.shape[-1] < call.key.shape[2]:
        mask = _only(indices, mask, call.key.shape[2])
    return mask


def _is_causal(call: AttentionCall) -> bool:
    """Of a call without a mask, by its own word or the module's; `check_host` knows better where
    that is not what the host does."""
    said = call.arguments.get("is_causal")
    if said is None and type(call.module).__name__ not in CAUSAL_IN_NAME_ONLY:
        said = getattr(call.module, "is_causal", False)
    return bool(said) and call.query.shape[2] > 1


def _biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    bias = bias if bias.dim() == 4 else bias[None]
    if mask is None:
        return bias
    visible, added = split_mask(mask)
    bias = bias if added is None else bias + added
    return bias.masked_fill(~visible, torch.finfo(bias.dtype).min)


def _only(indices: Tensor, mask: Tensor | None, keys: int) -> Tensor:
    """The mask `[B, 1, Tq, Tk]` with all keys hidden but `indices` `[B, Tq, top]`."""
    chosen = torch.zeros(*indices.shape[:2], keys + 1, dtype=torch.bool)
    # -1 stands for no key.
    chosen.scatter_(-1, indices.long() % (keys + 1), True)
    chosen = chosen[:, None, :, :keys]
    if mask is None or mask.dtype == torch.bool:
        return chosen if mask is None else mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _sinks(arguments: Mapping[str, Any], dtype: torch.dtype) -> Tensor | None:
    named = (arguments.get(name) for name in ("s_aux", "sinks"))
    found = next((sinks for sinks in named if sinks is not None), None)
    if found is None:
        return None
    # `[B, H, Tq, 1]` in hosts that have one for each query.
    return (found if found.dim() == 1 else found.squeeze(-1)).detach().to(dtype)


def _has_choice(call: AttentionCall) -> bool:
    keys = call.key.shape[2]
    if keys < 2:
        return False
    mask = _mask(call)
    if mask is None:
        return True
    visible = split_mask(mask)[0]
    return bool((visible.expand(*visible.shape[:-1], keys).sum(-1) > 1).any())
