"""A patched model beside its host: the same with the host's own dot product, near it when it is
calibrated to one softness, nearer with more.

The verdict is the cosine of the whole output, all hidden states as one vector: at least 0.99. How
the rows fare, one per token, is recorded beside it: the lowest cosine, and the share of rows that
reach 0.99 on their own. A row may miss it where the host decides in jumps, by a router of experts
say, and the row's decision fell by a hair; what a lost term would do to rows, `converges` sees.

A model that misses 0.99 by the closed form of `calibrate` is calibrated once more with `fit=True`
under the same softness. Where that misses, too, the host is asked how far it goes itself (see
`sensitivity`): "calibrated" does not apply where every attention call of gravity's is within 0.99
of the host's on the same q, k, v, and an equal change of the host's own softmax temperature takes
the host's output out of its own 0.99. Nothing else here is excused.
"""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, calibrate, patch_with_gravity, unpatch_gravity
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.integration.sites import find_attention_sites

from .checks import HostState, in_float64
from .outcomes import OK, Outcome, attempt, not_applicable, wrong
from .sensitivity import cosine_of_all, observed, relative_distance, sensitivity_of
from .sight import SEED, DotProduct, Inputs, Sight, whole_model

SOFTNESS = 16.0
LOWEST_COSINE = 0.99
MORE_SOFTNESS = 256.0
# What may be left of the distance there. By the first order a sixteenth is.
LEFT = 0.25
# Relative, as all distances here. At that softness float32 has rounded away what is below.
NO_DISTANCE = 1e-4
# What a host and its own attention on what gravity is given may differ by: masks in other forms.
ROUNDING = 1e-5


def check_host(model: PreTrainedModel, inputs: Inputs, host: HostState) -> Outcome:
    """Whether a patched model is its host when its attention modules go on with the dot product of
    what gravity is given: mask, window, cap, sinks and bias must all have come through.

    Where float32 fails, both are run in float64: there no router or indexer falls the other way by
    a rounding, and what is left is what gravity was given.
    """
    distance = _distance_by_dot_product(model, inputs, host.sight, host.visible_output)
    if distance <= ROUNDING:
        return OK
    exact = attempt(lambda: _check_host_in_float64(model, inputs, host.sight))
    return OK if exact.passed else wrong(f"its distance to the host is {distance:.2g} ({exact})")


def _check_host_in_float64(model: PreTrainedModel, inputs: Inputs, sight: Sight) -> Outcome:
    copy, inputs = in_float64(model, inputs)
    host = sight(unpatch_gravity(deepcopy(copy)), inputs, True)
    distance = _distance_by_dot_product(copy, inputs, sight, host)
    return OK if distance <= ROUNDING else wrong(f"in float64 {distance:.2g}")


def _distance_by_dot_product(
    model: PreTrainedModel, inputs: Inputs, sight: Sight, host: Tensor
) -> float:
    """What a query of padding gives is nobody's promise, and not every output shows where padding
    stood: of the two things that attention may give there, the one that the host's gives."""
    distance = float("inf")
    for zeros in (False, True):
        observers = dict.fromkeys(gravity_modules(model), DotProduct(zeros))
        found = relative_distance(observed(model, observers, inputs, sight), host)
        distance = min(distance, found)
        if distance <= ROUNDING:
            break
    return distance


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
        itself = sensitivity_of(self.model, self.inputs, self.sight)
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
        """Towards a large softness gravity is the host in first order of its inverse. What is lost
        on the way leaves a distance that no softness takes away; it is seen here where it is a
        quarter or more of gravity's own at softness 16, and by `check_host` where it is less."""
        first = relative_distance(self.output, self.host)
        left = relative_distance(self._at(MORE_SOFTNESS), self.host)
        if left <= max(LEFT * first, NO_DISTANCE):
            return OK
        return wrong(
            f"the distance to the host is {first:.2g} at softness {SOFTNESS:g} and {left:.2g} at "
            f"{MORE_SOFTNESS:g}"
        )

    @torch.no_grad()
    def _at(self, softness: float, fit: bool = False) -> Tensor:
        torch.manual_seed(SEED)
        calibrate(self.model, [self.inputs], softness=softness, fit=fit, progress=False)
        return self.sight(self.model, self.inputs, True)
