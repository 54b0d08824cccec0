"""The calibrated model beside its host: near it at one softness, ever nearer with more."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.integration.sites import find_attention_sites

from .checks import SEED, HostState, Inputs, output_of, run
from .inputs import main_output
from .outcomes import OK, Outcome, wrong

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
        other = output_of(model, inputs)
    finally:
        model.set_attn_implementation(host.attention)
    distance = relative_distance(other, host.output)
    if distance <= _HOST_ROUNDING:
        return OK
    return wrong(f"eager and sdpa attention differ by {distance:.2g}")


class Calibration:
    """A host patched once more, in the modules that its inputs reach, and calibrated to a softness.

    Args:
        model: the unpatched host.
        host: its main output, where padding stands as zeros.
        reached: names of the attention modules that the inputs reach.
    """

    def __init__(
        self, model: PreTrainedModel, inputs: Inputs, host: Tensor, reached: list[str]
    ) -> None:
        self.model, self.inputs, self.host = model, inputs, host
        names = [site.name for site in find_attention_sites(model)]
        layers = tuple(index for index, name in enumerate(names) if name in reached)
        patch_with_gravity(model, GravityConfig(layers=layers))
        self.output = self._at(SOFTNESS)
        self.cosine = lowest_cosine(self.output, host)

    def check_calibrated(self) -> Outcome:
        if self.cosine >= LOWEST_COSINE:
            return OK
        return wrong(f"the lowest cosine is {self.cosine:.4f}")

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
    def _at(self, softness: float) -> Tensor:
        torch.manual_seed(SEED)
        calibrate(self.model, [self.inputs], softness=softness, progress=False)
        return main_output(run(self.model, self.inputs), self.inputs)


def relative_distance(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def lowest_cosine(actual: Tensor, exact: Tensor) -> float:
    """Over the rows of the last dimension that are not padding; of the whole where a row is a
    single number."""
    rows = exact.shape[-1] if exact.dim() and exact.shape[-1] > 1 else exact.numel()
    if actual.shape != exact.shape:
        raise ValueError(f"expected an output {list(exact.shape)}, got {list(actual.shape)}")
    a, b = (x.double().reshape(-1, rows) for x in (actual, exact))
    real = (a != 0).any(-1) | (b != 0).any(-1)
    cosines = torch.nn.functional.cosine_similarity(a[real], b[real], dim=-1)
    return cosines.min().item() if cosines.numel() else 1.0
