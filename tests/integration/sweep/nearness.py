"""The calibrated model beside its host: near it at one softness, ever nearer with more.

The verdict is the cosine of the whole output, all hidden states as one vector: at least 0.99. How
the rows fare, one per token, is recorded beside it: the lowest cosine, and the share of rows that
reach 0.99 on their own. A row may miss it where the host decides in jumps, by a router of experts
say, and the row's decision fell by a hair; what a lost term would do to rows, `converges` sees.

A model that misses 0.99 by the closed form of `calibrate` is calibrated once more with `fit=True`
under the same softness. Where that misses, too, the host is asked how far it goes itself (see
`sensitivity`): no promise applies where every attention call of gravity's is within 0.99 of the
host's on the same q, k, v, and an equal change of the host's own softmax temperature takes the
host's output out of its own 0.99.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.integration.sites import find_attention_sites

from .checks import HostState, Inputs
from .outcomes import OK, Outcome, not_applicable, wrong
from .sensitivity import cosine_of_all, relative_distance, sensitivity_of
from .sight import SEED, Sight, whole_model

SOFTNESS = 16.0
LOWEST_COSINE = 0.99
MORE_SOFTNESS = (64.0, 256.0)
# Relative, as all distances here. What two implementations of one formula may differ by.
_HOST_ROUNDING = 1e-3
# At these softnesses float32 has rounded away what is below.
_NO_DISTANCE = 1e-4


def check_host_agrees(model: PreTrainedModel, inputs: Inputs, host: HostState) -> Outcome:
    """Whether an unpatched host says the same under both of transformers' own implementations;
    where it does not, there is no one output to come near."""
    model.set_attn_implementation("eager" if host.attention == "sdpa" else "sdpa")
    try:
        other = host.sight(model, inputs, False)
    finally:
        model.set_attn_implementation(host.attention)
    distance = relative_distance(other, host.output)
    if distance <= _HOST_ROUNDING:
        return OK
    return wrong(f"eager and sdpa attention differ by {distance:.2g}")


class Nearness(NamedTuple):
    """`whole`: cosine of the outputs as one vector each; `lowest`: over the rows of the last
    dimension that are not padding; `near_rows`: the share of these that reach `LOWEST_COSINE`."""

    whole: float
    lowest: float
    near_rows: float

    @classmethod
    def of(cls, actual: Tensor, exact: Tensor) -> Nearness:
        """Where a row is a single number, the whole is one row."""
        if actual.shape != exact.shape:
            raise ValueError(f"expected an output {list(exact.shape)}, got {list(actual.shape)}")
        rows = exact.shape[-1] if exact.dim() and exact.shape[-1] > 1 else exact.numel()
        a, b = (x.double().reshape(-1, rows) for x in (actual, exact))
        real = (a != 0).any(-1) | (b != 0).any(-1)
        cosines = torch.nn.functional.cosine_similarity(a[real], b[real], dim=-1)
        if not cosines.numel():
            return cls(1.0, 1.0, 1.0)
        near = (cosines >= LOWEST_COSINE).double().mean().item()
        return cls(cosine_of_all(actual, exact), cosines.min().item(), near)


class Calibration:
    """A host patched once more, in the modules that its inputs reach, and calibrated to a softness.

    Args:
        model: the unpatched host.
        host: its output, where padding stands as zeros.
        reached: names of the attention modules that the inputs reach.
        sight: what `host` was seen by.

    Attributes:
        nearness: at softness 16 by the closed form.
        note: how else 0.99 was reached; "" where the closed form does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Inputs,
        host: Tensor,
        reached: list[str],
        sight: Sight = whole_model,
    ) -> None:
        self.model, self.inputs, self.host, self.sight = model, inputs, host, sight
        names = [site.name for site in find_attention_sites(model)]
        layers = tuple(index for index, name in enumerate(names) if name in reached)
        patch_with_gravity(model, GravityConfig(layers=layers))
        self.output = self._at(SOFTNESS)
        self.nearness = Nearness.of(self.output, host)
        self.note = ""

    def check_calibrated(self) -> Outcome:
        closed = self.nearness.whole
        if closed >= LOWEST_COSINE:
            return OK
        fitted = cosine_of_all(self._at(SOFTNESS, fit=True), self.host)
        if fitted >= LOWEST_COSINE:
            self.note = (
                f"calibrated: cosine {fitted:.4f} by calibrate(fit=True), {closed:.4f} by the "
                "closed form"
            )
            return OK
        found = f"the cosine is {closed:.4f}, fitted {fitted:.4f}"
        self._at(SOFTNESS)
        itself = sensitivity_of(self.model, self.inputs, self.host, self.sight)
        if itself.local >= LOWEST_COSINE > itself.moved:
            return not_applicable(
                f"{found}; every attention output is within {itself.local:.4f}, and as small a "
                f"change of its own softmax temperature takes the host to {itself.moved:.4f}"
            )
        return wrong(
            f"{found}; the attention outputs are within {itself.local:.4f}, an equal change of its "
            f"own softmax temperature takes the host to {itself.moved:.4f}"
        )

    def check_converges(self) -> Outcome:
        """Towards a large softness gravity is the host in first order of its inverse. A mask, sink,
        cap or bias that were lost or misread would leave a distance that no softness takes away."""
        first = relative_distance(self.output, self.host)
        left = []
        for softness in MORE_SOFTNESS:
            left.append(relative_distance(self._at(softness), self.host))
            if left[-1] <= max(0.5 * first, _NO_DISTANCE):
                return OK
        steps = ", ".join(f"{distance:.2g}" for distance in (first, *left))
        return wrong(f"distances to the host at softness {SOFTNESS:g} and more: {steps}")

    @torch.no_grad()
    def _at(self, softness: float, fit: bool = False) -> Tensor:
        torch.manual_seed(SEED)
        calibrate(self.model, [self.inputs], softness=softness, fit=fit, progress=False)
        return self.sight(self.model, self.inputs, True)
