"""One call of an LGT's attention: what it computes, and what an observer may ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...layers.observing import RowSample, capped_force
from ...ops.api import gravity_attention
from ...ops.exporting import is_exporting
from ...ops.reference import compute_dtype, gravity_attention_reference
from ...ops.shared_op import shared_attention
from ..visibility import visible_rows
from .geometry import Geometry
from .law import Law

if TYPE_CHECKING:
    from .attention import LGTAttention

# What these are on a CPU is one thing.
_CHUNKED = ("auto", "chunked")
_SMALLEST_STRENGTH = 1e-12


@dataclass(frozen=True, eq=False)
class LGTAttentionCall:
    """One call of `LGTAttention`, as an observer is shown it.

    query_mass `[B, H, Tq]`, key_mass `[B, H, Tk]`, strength `[H]`, value `[B, H, Tk, h]`.
    """

    module: LGTAttention
    query_mass: Tensor
    key_mass: Tensor
    strength: Tensor
    value: Tensor
    geometry: Geometry
    law: Law
    weights_asked: bool

    @property
    def max_force(self) -> float | None:
        """The cap on the force; the power law has none."""
        return self.law.max_force

    @property
    def force_cap(self) -> str:
        return self.law.force_cap

    def query_count(self) -> int:
        return self.query_mass.shape[-1]

    def masses(self) -> Tensor:
        """Of the queries, `[B, H, Tq]`."""
        return self.query_mass

    def gravity(self) -> tuple[Tensor, Tensor | None]:
        """`[B, Tq, H, h]`; the weights `[B, H, Tq, Tk]` where they are asked for, else None."""
        if self._is_plain():
            return self._by_table().transpose(1, 2), None
        implementation = self.law.implementation
        batch, heads = self.value.shape[:2]
        q, k, options = self.geometry.distance_options(batch, heads)
        options = {**options, **self._masses(), **self.geometry.visible._asdict()}
        mass = options.pop("mass")
        if not self.weights_asked and implementation != "reference":
            output = gravity_attention(q, k, self.value, mass, impl=implementation, **options)
            return output.transpose(1, 2), None
        if isinstance(options["eps"], float):
            options["eps"] = mass.new_full(mass.shape, options["eps"])
        if q is not None:
            q, k = q.to(self.value.dtype), k.to(self.value.dtype)
        result = gravity_attention_reference(q, k, self.value, mass, **options)
        weights = result.weights if self.weights_asked else None
        return result.output.transpose(1, 2), weights

    def rows(self, rows: Tensor) -> RowSample:
        """Forces and scores of query rows by their indices, int64 `[R]`."""
        with torch.no_grad(), torch.autocast(self.value.device.type, enabled=False):
            inverse = self.geometry.inverse_rows(rows)
            strength = self.strength[:, None, None]
            if self.law.power:
                score = strength * (self.key_mass.unsqueeze(-2) * inverse).log()
                force = score.exp()
            else:
                own = (strength.squeeze(-1) * self.query_mass[:, :, rows]).unsqueeze(-1)
                force = own * self.key_mass.unsqueeze(-2) * inverse
                score = capped_force(force, self.max_force, self.force_cap)
            seen = self.geometry.visible
            visible, bias = visible_rows(seen, rows, self.query_count(), self.key_mass.shape[-1])
            if bias is not None:
                score = score + bias.to(score.dtype)
            visible = visible.expand(*visible.shape[:2], *score.shape[-2:])
            return RowSample(force, score.masked_fill(~visible, _lowest(score)), visible)

    def _masses(self) -> dict[str, Any]:
        if self.law.power:
            # (m_j / D)^|G|. The root and its gradient are finite where G is 0.
            mass = self.strength.clamp(min=_SMALLEST_STRENGTH).sqrt()
            key_mass = self.key_mass ** self.strength[:, None]
            return {"law": "power", "mass": mass, "key_mass": key_mass}
        return {
            "mass": torch.ones_like(self.strength),
            "query_mass": self.strength[:, None] * self.query_mass,
            "key_mass": self.key_mass,
            "max_force": self.law.max_force,
            "force_cap": self.law.force_cap,
        }

    def _is_plain(self) -> bool:
        """On a CPU, with a table, nothing from the caller to check, and no choice to be made."""
        seen = self.geometry.visible
        plain = self.geometry.table is not None and seen.mask is None and seen.key_ranges is None
        plain = plain and not self.weights_asked and self.law.implementation in _CHUNKED
        return plain and self.value.device.type == "cpu" and not is_exporting()

    def _by_table(self) -> Tensor:
        """`[B, H, Tq, h]` as by `gravity_attention`, whose way from arguments to the operator costs
        a short sequence as much as the operator does."""
        law, seen, table, value = self.law, self.geometry.visible, self.geometry.table, self.value
        dtype = compute_dtype(value.dtype)
        strength, key_term = self.strength.view(1, -1, 1), self.key_mass
        if law.power:
            strength = strength.clamp(min=_SMALLEST_STRENGTH)
            key_term = strength * key_term.log()
        else:
            strength = strength * self.query_mass
        table = table.unsqueeze(0).unsqueeze(0) if table.dim() == 2 else table
        tensors = (value, strength, key_term, table)
        output = shared_attention(
            None,
            None,
            *(x.to(dtype) for x in tensors),
            None,
            None,
            "power" if law.power else "force",
            seen.causal,
            None,
            seen.exclude_self,
            law.max_force,
            law.force_cap == "tanh",
            0.0,
            None,
            1.0,
        )
        return output.to(value.dtype)


def _lowest(score: Tensor) -> float:
    return torch.finfo(score.dtype).min
