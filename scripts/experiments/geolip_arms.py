"""The geolips that the experiment on features compares: presets, attention, lens, one thing
changed at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One model of the comparison.

    Attributes:
        name: in tables and in the ids of runs.
        preset: of `GEOLIP_PRESETS`.
        changes: settings of `GeolipConfig` beyond the preset.
        layer: of the host, where it is not that of the command.
        seeds: as many, from 0 on, unless the command names others.
        group: `main`, or `ablations`: base with something changed.
    """

    name: str
    preset: str = "base"
    changes: dict[str, Any] = field(default_factory=dict)
    layer: int | None = None
    seeds: int = 1
    group: str = "main"

    def settings(self, patch_dim: int) -> dict[str, Any]:
        """Of `GeolipConfig`."""
        from gravity_hf.models.geolip import GEOLIP_PRESETS

        return {**GEOLIP_PRESETS[self.preset], **self.changes, "patch_dim": patch_dim}


BASE = "base"
_SMALLER = {"num_rows": 32}


def _ablation(name: str, **changes: Any) -> Arm:
    return Arm(name, changes=changes, group="ablations")


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(BASE, seeds=3),
        Arm("base, gravity", changes={"spectral_attention": "gravity"}, seeds=3),
        Arm("base, no attention", changes={"use_spectral": False}, seeds=3),
        Arm("base, 32 rows", changes=_SMALLER, seeds=3),
        Arm("tiny", preset="tiny", seeds=3),
        Arm("wide", preset="wide"),
        Arm("base, last layer", layer=-1),
        _ablation("learned lens", lens_mode="learned"),
        _ablation("signs dropped", lens_sign="canon"),
        _ablation("trained by cosine, too", reconstruction_loss="cosine_mse"),
        _ablation("32 rows, barrier", **_SMALLER, rigidity_weight=10.0),
        # As many numbers for each token as base has, within two percent. The lens has 16, too.
        _ablation("no lift, 26 rows of 16", num_rows=26, base_dim=16),
    )
}
GROUPS = ("main", "ablations")


def chosen(names: Sequence[str]) -> list[Arm]:
    """Arms of groups and of names, in the order of `ARMS`.

    Raises:
        ValueError: no such arm.
    """
    unknown = [name for name in names if name not in ARMS and name not in GROUPS]
    if unknown:
        raise ValueError(f"--arms: expected of {[*GROUPS, *ARMS]}, got {unknown}")
    return [arm for arm in ARMS.values() if arm.name in names or arm.group in names]
