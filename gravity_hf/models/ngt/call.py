"""One call of an NGT's attention: what it computes, and what an observer may ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...layers.observing import RowSample
from ...ops.api import gravity_attention
from ...ops.reference import gravity_attention_reference, gravity_score, squared_distance
from ..visibility import Visibility, visible_rows
from .coordinates import Geometry
from .gravity import GravityTerms

if TYPE_CHECKING:
    from .attention import NGTAttention


@dataclass(frozen=True, eq=False)
class NGTAttentionCall:
    """One call of `NGTAttention`, as an observer is shown it.

    queries `[B, H, Tq, c]`, keys `[B, H, Tk, c]`, value `[B, H, Tk, h]`; geometry: of the tokens
    that ask.
    """

    module: NGTAttention
    queries: Tensor
    keys: Tensor
    value: Tensor
    geometry: Geometry
    terms: GravityTerms
    visible: Visibility
    implementation: str
    weights_asked: bool

    @property
    def max_force(self) -> float | None:
        """The force of an NGT has no cap."""
        return None

    @property
    def force_cap(self) -> str:
        return "clamp"

    def query_count(self) -> int:
        return self.queries.shape[2]

    def masses(self) -> Tensor:
        """`[B, H, Tq]`, as scores have them but for age; `[H]`, ones, where they have none."""
        terms = self.module.gravity(self.geometry.masses, self.geometry.log_masses)
        if terms.log_key_mass is not None:
            return terms.log_key_mass.exp()
        return torch.ones_like(terms.mass) if terms.key_mass is None else terms.key_mass

    def gravity(self) -> tuple[Tensor, Tensor | None]:
        """`[B, Tq, H, h]`; the weights `[B, H, Tq, Tk]` where they are asked for, else None."""
        module = self.module
        options: dict[str, Any] = {
            **self.terms._asdict(),
            **self.visible._asdict(),
            "law": module.law,
            "repulsive": module.repulsive,
            "dropout_p": module.dropout if module.training else 0.0,
        }
        mass = options.pop("mass")
        tensors = (self.queries, self.keys, self.value, mass)
        if not self.weights_asked:
            output = gravity_attention(*tensors, impl=self.implementation, **options)
            return output.transpose(1, 2), None
        options["eps"] = self._softening()
        result = gravity_attention_reference(*tensors, **options)
        return result.output.transpose(1, 2), result.weights

    def rows(self, rows: Tensor) -> RowSample:
        """Forces and scores of query rows by their indices, int64 `[R]`."""
        terms, module = self.terms, self.module
        with torch.no_grad(), torch.autocast(self.value.device.type, enabled=False):
            distance_sq = squared_distance(self.queries[:, :, rows], self.keys)
            own = None if terms.query_mass is None else terms.query_mass[:, :, rows]
            law = (terms.mass, self._softening(), module.law, own, terms.key_mass)
            logs = {"log_key_mass": terms.log_key_mass}
            force = gravity_score(distance_sq, *law, repulsive=module.repulsive, **logs)
            score = gravity_score(
                distance_sq,
                *law,
                head_bias=terms.head_bias,
                repulsive=module.repulsive,
                cutoff=terms.cutoff,
                **logs,
            )
            # Weights of the power law are forces.
            force = force.exp() if module.law == "power" else force
            hidden = None if terms.cutoff is None else terms.cutoff.hidden(distance_sq)
            sizes = (self.query_count(), self.keys.shape[2])
            visible, bias = visible_rows(self.visible, rows, *sizes, hidden)
            if bias is not None:
                score = score + bias.to(score.dtype)
            visible = visible.expand(*visible.shape[:2], *score.shape[-2:])
            return RowSample(force, score.masked_fill(~visible, _lowest(score)), visible)

    def _softening(self) -> Tensor:
        """`[H]`."""
        eps, mass = self.terms.eps, self.terms.mass
        return eps if isinstance(eps, Tensor) else mass.new_full(mass.shape, eps)


def _lowest(score: Tensor) -> float:
    return torch.finfo(score.dtype).min
