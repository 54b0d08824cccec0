"""What `calibrate` found: plain rows, a readable table, JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from ..config import GravityConfig

_COLUMNS = ("mean_distance", "mass", "softening", "key_radius_sq", "contrast", "kl")


@dataclass(frozen=True)
class CalibrationReport:
    """One row per converted head.

    Row keys: `layer` (module name), `head` (query head), `mean_distance` (squared distance, mean
    under the host's attention weights), `mass`, `softening`, `key_radius_sq` (None when euclidean),
    `contrast` (`((d2_95 + eps)/(d2_05 + eps))^2` over visible pairs; near 1 the head is barely
    gravitational), `kl` (mean KL(host || gravity) of the attention rows, nats).
    """

    settings: GravityConfig
    rows: tuple[dict[str, Any], ...]

    def summary(self) -> dict[str, Any]:
        """The few numbers to quote beside a quality: softness, law, contrast, KL."""
        contrasts = [row["contrast"] for row in self.rows]
        divergences = [row["kl"] for row in self.rows]
        return {
            "softness": self.settings.softness,
            "law": self.settings.law,
            "distance": self.settings.distance,
            "heads": len(self.rows),
            "contrast_min": min(contrasts),
            "contrast_median": statistics.median(contrasts),
            "contrast_max": max(contrasts),
            "kl_mean": statistics.fmean(divergences),
            "kl_max": max(divergences),
        }

    def table(self) -> str:
        """Fixed-width text, one line per head."""
        width = max(len("layer"), *(len(row["layer"]) for row in self.rows))
        header = f"{'layer':<{width}} {'head':>4} " + " ".join(f"{c:>13}" for c in _COLUMNS)
        lines = [header]
        for row in self.rows:
            cells = " ".join(f"{_cell(row[column]):>13}" for column in _COLUMNS)
            lines.append(f"{row['layer']:<{width}} {row['head']:>4} {cells}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Settings, summary and rows."""
        content = {
            "settings": self.settings.to_dict(),
            "summary": self.summary(),
            "rows": list(self.rows),
        }
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        return self.table()


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
