"""Where a model is looked at: its main output, or the outputs of its attention modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf.integration.attention import AttentionCall
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.ops.reference import split_mask

from .inputs import floating_tensors, main_output

Inputs = Mapping[str, Any]

SEED = 0

# Of a model, its inputs and whether padding counts as zeros.
Sight = Callable[[PreTrainedModel, Inputs, bool], Tensor]


def run(model: PreTrainedModel, inputs: Inputs) -> Any:
    """The model's output without attention weights, which some hosts return unasked. Hosts that
    draw random numbers draw the same ones each time."""
    torch.manual_seed(SEED)
    output = model(**inputs)
    if not isinstance(output, dict):
        return output
    return {name: value for name, value in output.items() if "attentions" not in name}


@torch.no_grad()
def whole_model(model: PreTrainedModel, inputs: Inputs, visible: bool = False) -> Tensor:
    """The model's main output without gradients."""
    return main_output(run(model, inputs), inputs if visible else None).clone()


class AttentionOutputs:
    """The outputs of attention modules in one row, for models whose own output does not show what
    attention did: it is a choice among codes, or attention is rounded away in it.

    Args:
        names: of the attention modules, which are the same in the host and in the patched model.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs, visible: bool = False) -> Tensor:
        seen: list[Tensor] = []

        def see(module: Any, given: Any, output: Any) -> None:
            states = next(floating_tensors(output))
            seen.append(main_output(states, inputs if visible else None).flatten())

        hooks = [model.get_submodule(name).register_forward_hook(see) for name in self.names]
        try:
            run(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(seen)[None]


class DotProduct(NamedTuple):
    """An observer: the host's attention on what gravity is given.

    Attributes:
        zeros: whether queries that see no key give zeros, as of SDPA; else what the attention makes
            of a mask that hides everything, the mean of the values as a rule.
    """

    zeros: bool = False

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        output, weights = call.dot_product()
        mask = call.host_terms.folded_mask
        if not self.zeros or mask is None:
            return output, weights
        seeing = split_mask(mask)[0].any(-1).transpose(1, 2).unsqueeze(-1)
        return output.masked_fill(~seeing, 0.0), weights


class _Moved(NamedTuple):
    """An observer: the host's attention, doubled and turned round."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        output, weights = call.dot_product()
        return -2.0 * output, weights


def shows_attention(model: PreTrainedModel, inputs: Inputs, host: Tensor) -> bool:
    """Whether the main output of a patched model is another than `host`, bit for bit, when the
    attention of the host itself goes on with quite other numbers."""
    modules = gravity_modules(model).values()
    for gravity in modules:
        gravity.observer = _Moved()
    try:
        return not torch.equal(whole_model(model, inputs), host)
    finally:
        for gravity in modules:
            gravity.observer = None
