"""What `factorize` did to each linear map: plain rows, a readable table, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FactorizedMap:
    """One linear map.

    `rank`: None where it stayed dense, `note` says why. `energy`: the share of the outputs' energy
    (of the squared weights, without calibration) that its rank keeps, 1 where it is dense.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    rank: int | None
    energy: float
    note: str = ""

    @property
    def parameters_before(self) -> int:
        return self.in_features * self.out_features + self._of_bias

    @property
    def parameters_after(self) -> int:
        if self.rank is None:
            return self.parameters_before
        return self.rank * (self.in_features + self.out_features) + self._of_bias

    @property
    def flops_before(self) -> int:
        """Of a token: two for each weight."""
        return 2 * (self.parameters_before - self._of_bias)

    @property
    def flops_after(self) -> int:
        return 2 * (self.parameters_after - self._of_bias)

    @property
    def _of_bias(self) -> int:
        return self.out_features if self.bias else 0


@dataclass(frozen=True)
class FactorizationReport:
    """Rows of `factorize`, in the order of the model.

    `skipped`: linear maps that were left alone, and why. `parameters_before`, `parameters_after`:
    of the whole model, tied tensors once. `calibrated`: whether inputs were measured.
    """

    maps: tuple[FactorizedMap, ...]
    skipped: Mapping[str, str]
    parameters_before: int
    parameters_after: int
    calibrated: bool

    @property
    def ranks(self) -> dict[str, int]:
        """By name, of the maps that are in two factors now."""
        return {row.name: row.rank for row in self.maps if row.rank is not None}

    def summary(self) -> dict[str, Any]:
        """The few numbers to quote: maps, their parameters and FLOPs, and those of the model."""
        kept = [row.energy for row in self.maps if row.rank is not None]
        before, after = (
            {
                "parameters": sum(getattr(row, f"parameters_{when}") for row in self.maps),
                "flops_per_token": sum(getattr(row, f"flops_{when}") for row in self.maps),
            }
            for when in ("before", "after")
        )
        return {
            "maps": len(self.maps),
            "factorized": len(kept),
            "dense": len(self.maps) - len(kept),
            "skipped": len(self.skipped),
            "calibrated": self.calibrated,
            "energy_min": min(kept, default=math.nan) if kept else None,
            "energy_mean": sum(kept) / len(kept) if kept else None,
            **{f"maps_{name}_before": value for name, value in before.items()},
            **{f"maps_{name}_after": value for name, value in after.items()},
            "model_parameters_before": self.parameters_before,
            "model_parameters_after": self.parameters_after,
        }

    def table(self) -> str:
        """Fixed-width text, one line per map."""
        width = max([len("map"), *(len(row.name) for row in self.maps)])
        lines = [f"{'map':<{width}} {'in x out':>13} {'rank':>6} {'energy':>8} {'parameters':>23}"]
        for row in self.maps:
            size = f"{row.in_features} x {row.out_features}"
            rank = "dense" if row.rank is None else str(row.rank)
            numbers = f"{row.parameters_before:,} > {row.parameters_after:,}"
            line = f"{row.name:<{width}} {size:>13} {rank:>6} {row.energy:>8.4f} {numbers:>23}"
            lines.append(f"{line}  {row.note}".rstrip())
        lines += [f"{name:<{width}} skipped: {why}" for name, why in self.skipped.items()]
        lines.append(f"model: {self.parameters_before:,} > {self.parameters_after:,} parameters")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Summary, rows, and what was skipped."""
        rows = [asdict(row) for row in self.maps]
        content = {"summary": self.summary(), "maps": rows, "skipped": dict(self.skipped)}
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        return self.table()
