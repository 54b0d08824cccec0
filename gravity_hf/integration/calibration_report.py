"""What `calibrate` found: plain rows, a readable table, JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import GravityConfig
from .closed_form import Solution
from .observers import Agreement

_COLUMNS = (
    "mean_distance",
    "mass",
    "softness",
    "softening",
    "key_radius_sq",
    "contrast",
    "kl",
)


@dataclass(frozen=True)
class CalibrationReport:
    """One row per converted head.

    Row keys: `layer` (module name), `head` (query head), `mean_distance` (squared distance, mean
    under the host's attention weights), `mass`, `softness` (the head's factor f), `softening`,
    `key_radius_sq` (None when euclidean), `contrast` (`((d2_95 + eps)/(d2_05 + eps))^2` over
    visible pairs; near 1 the head is barely gravitational), `kl` (mean KL(host || gravity) of the
    attention rows, nats), and after `calibrate(..., max_kl=...)` `within_budget` (bool).
    """

    settings: GravityConfig
    rows: tuple[dict[str, Any], ...]

    def summary(self) -> dict[str, Any]:
        """The few numbers to quote beside a quality: softness, law, contrast, KL; with a budget,
        also how many heads miss it."""
        contrasts = [row["contrast"] for row in self.rows]
        divergences = [row["kl"] for row in self.rows]
        factors = [row["softness"] for row in self.rows]
        content = {
            "softness": self.settings.softness,
            "softness_min": min(factors),
            "softness_median": statistics.median(factors),
            "softness_max": max(factors),
            "law": self.settings.law,
            "distance": self.settings.distance,
            "heads": len(self.rows),
            "contrast_min": min(contrasts),
            "contrast_median": statistics.median(contrasts),
            "contrast_max": max(contrasts),
            "kl_mean": statistics.fmean(divergences),
            "kl_median": statistics.median(divergences),
            "kl_max": max(divergences),
        }
        met = [row["within_budget"] for row in self.rows if "within_budget" in row]
        if met:
            content |= {"max_kl": self.settings.max_kl, "over_budget": met.count(False)}
        return content

    def table(self) -> str:
        """Fixed-width text, one line per head; `!` marks a KL over the budget."""
        width = max(len("layer"), *(len(row["layer"]) for row in self.rows))
        header = f"{'layer':<{width}} {'head':>4} " + " ".join(f"{c:>13}" for c in _COLUMNS)
        lines = [header]
        for row in self.rows:
            cells = " ".join(f"{_cell(row[column]):>13}" for column in _COLUMNS)
            mark = "" if row.get("within_budget", True) else " !"
            lines.append(f"{row['layer']:<{width}} {row['head']:>4} {cells}{mark}")
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


def report_rows(
    solutions: Mapping[str, Solution], agreements: Mapping[str, Agreement], max_kl: float | None
) -> tuple[dict[str, Any], ...]:
    """The rows of a report, from what each module got and how it agrees with the host."""
    rows = []
    for name, solution in solutions.items():
        terms = solution.terms()
        divergence, contrast = agreements[name].divergence(), agreements[name].contrast()
        heads, radius = solution.softening.shape[0], terms.key_radius_sq
        for head in range(heads):
            at = 0 if radius is None else head * radius.shape[0] // heads
            row: dict[str, Any] = {
                "layer": name,
                "head": head,
                "mean_distance": solution.geometry.mean_distance[head].item(),
                "mass": terms.mass[head].item(),
                "softness": solution.factor[head].item(),
                "softening": terms.softening[head].item(),
                "key_radius_sq": None if radius is None else radius[at].item(),
                "contrast": contrast[head].item(),
                "kl": divergence[head].item(),
            }
            if max_kl is not None:
                row["within_budget"] = row["kl"] <= max_kl
            rows.append(row)
    return tuple(rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
