"""The models that the NGT experiments compare: presets, ablations, twins, all with as many
parameters."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Sizes by name. "large" is that of the published experiment on WikiText-103.
SHAPES: dict[str, dict[str, int]] = {
    "large": {
        **{"hidden_size": 512, "coord_dim": 64, "num_hidden_layers": 8, "num_attention_heads": 8},
        # So that v2 has the 25.5 M parameters of that experiment's models.
        **{"intermediate_size": 1920, "max_position_embeddings": 512},
    },
    "small": {
        **{"hidden_size": 96, "coord_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 4},
        **{"intermediate_size": 384, "max_position_embeddings": 128},
    },
    "quick": {
        **{"hidden_size": 16, "coord_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 64, "max_position_embeddings": 16},
    },
}
_TOLERANCE = 0.01
# Chosen in trial runs of v2 on the standard library's source.
_SCALE = 30.0
# Feed-forward widths that had to change are multiples of the largest of these that will do: matrix
# units want whole tiles.
_STEPS = (64, 32, 8, 1)


@dataclass(frozen=True)
class Arm:
    """One model of a comparison.

    Attributes:
        name: in tables and in the ids of runs.
        preset: of `NGT_PRESETS`.
        changes: settings of `NGTConfig` beyond the preset.
        repulsion: weight of the repulsion loss.
        gravity_scale: how much faster the constants of heads learn than weights; None: 30 with the
            preset "v2", 1 with the published ones.
        group: `main`, what is compared with seeds and tuned rates; or `ablations`: v2 with one
            thing changed, the published design mended, and another twin.
    """

    name: str
    preset: str = "v2"
    changes: dict[str, Any] = field(default_factory=dict)
    repulsion: float = 0.0
    gravity_scale: float | None = None
    group: str = "main"

    @property
    def scale(self) -> float:
        """Of the rate of the constants of heads, of which twins have none."""
        if self.gravity_scale is not None:
            return self.gravity_scale
        return _SCALE if self.preset == "v2" and not self.is_twin else 1.0

    @property
    def is_twin(self) -> bool:
        return self.changes.get("attention") == "dot_product"


V2, VANILLA, ALIBI = "NGT v2", "vanilla", "ALiBi"


def _twin(positions: str) -> dict[str, Any]:
    return {"attention": "dot_product", "positions": positions}


def _v2(name: str, **changes: Any) -> Arm:
    return Arm(name, changes=changes, group="ablations")


# The force law has no masses that fade.
_FORCE = {"law": "force", "mass_fading": 0.0}
# v2 before all that was added to its geometry: one map, from coordinates alone.
_PLAIN = {"asymmetric": False, "hidden_head_coordinates": False, "mass_fading": 0.0}
_PLAIN |= {"initial_strength": 2.0, "softening": 0.1}
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(V2),
        Arm("NGT reference", "reference"),
        Arm("NGT fixed", "fixed", group="ablations"),
        Arm(VANILLA, changes=_twin("learned")),
        Arm(ALIBI, changes=_twin("alibi")),
        _v2("sinusoidal twin", **_twin("sinusoidal")),
        _v2("plain geometry", **_PLAIN),
        _v2("no content", content_coordinates=False),
        _v2("anchors", anchor_coordinates=True),
        _v2("head coordinates not from hidden", hidden_head_coordinates=False),
        _v2("symmetric", asymmetric=False),
        _v2("asymmetric from the start", shared_start=False),
        _v2("no symmetric heads", symmetric_heads=0),
        _v2("one symmetric head", symmetric_heads=1),
        _v2("four symmetric heads", symmetric_heads=4),
        _v2("32 head coordinates", head_coord_dim=32),
        _v2("8 head coordinates", head_coord_dim=8),
        _v2("evolution from hidden, too", coordinate_source="hidden"),
        _v2("no evolution", coordinate_source="none"),
        _v2("sees itself", exclude_self=False),
        _v2("no masses", token_masses=False),
        _v2("masses in values", mass_in_value=True),
        _v2("no mass exponent", mass_exponent=False),
        _v2("no mass fades", mass_fading=0.0),
        _v2("half of the masses fade", mass_fading=0.5),
        _v2("fixed softening", learn_softening=False),
        _v2("softening 0.1", softening=0.1),
        _v2("strength 2", initial_strength=2.0),
        _v2("force law", **_FORCE),
        _v2("force law, repulsive", **_FORCE, repulsive=True),
        _v2("hard cutoff", cutoff="hard"),
        _v2("log cutoff", cutoff="log"),
        _v2("learned coordinates", coordinate_positions="learned"),
        _v2("learned, from sinusoids", coordinate_positions="learned_sinusoidal"),
        _v2("position base 10000", position_base=10000.0),
        Arm("constants learn as weights do", gravity_scale=1.0, group="ablations"),
        Arm("repulsion loss", repulsion=0.05, group="ablations"),
    )
}
GROUPS = ("main", "ablations")


def chosen(names: Sequence[str]) -> list[Arm]:
    """Arms of groups and of names, in the order of `ARMS`; v2 goes with the ablations.

    Raises:
        ValueError: no such arm.
    """
    unknown = [name for name in names if name not in ARMS and name not in GROUPS]
    if unknown:
        raise ValueError(f"--arms: expected of {[*GROUPS, *ARMS]}, got {unknown}")
    wanted = set(names) | ({V2} if "ablations" in names else set())
    return [arm for arm in ARMS.values() if arm.name in wanted or arm.group in wanted]


@functools.cache
def matched_settings(name: str, shape: str, vocabulary: int) -> dict[str, Any]:
    """Settings of `NGTConfig` for an arm, with a feed-forward width that gives it as many
    parameters as v2 has at this shape, within one percent.

    The width of v2 stays where the counts are that near as it is, so that an ablation changes one
    thing alone.
    """
    from gravity_hf.models.ngt import NGT_PRESETS

    arm = ARMS[name]
    settings = {**NGT_PRESETS[arm.preset], **SHAPES[shape], "vocab_size": vocabulary, **arm.changes}
    wanted = count({**NGT_PRESETS["v2"], **SHAPES[shape], "vocab_size": vocabulary})

    def misses(width: int) -> bool:
        have = count({**settings, "intermediate_size": width})
        return abs(have - wanted) > _TOLERANCE * wanted

    width = settings["intermediate_size"]
    if misses(width):
        have = count(settings)
        each = count({**settings, "intermediate_size": width + 1}) - have
        exact = width + (wanted - have) / each
        nearest = (step * round(exact / step) for step in _STEPS)
        width = next((x for x in nearest if x > 0 and not misses(x)), 0)
        if not width:
            raise ValueError(
                f"{name}: expected about {wanted:,} parameters, but no feed-forward width gives so "
                f"many; {exact:.1f} would. Choose a larger shape than {shape!r}"
            )
    return {**settings, "intermediate_size": width}


@functools.cache
def fingerprint(name: str, shape: str) -> str:
    """Of all settings of an arm, defaults included: a run under others is another run."""
    from gravity_hf.models.ngt import NGT_PRESETS, NGTConfig

    arm = ARMS[name]
    config = NGTConfig(**{**NGT_PRESETS[arm.preset], **SHAPES[shape], **arm.changes})
    values = {field: getattr(config, field) for field in NGTConfig.__annotations__}
    text = json.dumps([values, arm.repulsion, arm.scale], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def count(settings: dict[str, Any]) -> int:
    """Parameters of the model with these settings, tied ones once; no memory is taken."""
    import torch

    from gravity_hf.models.ngt import NGTConfig, NGTForCausalLM

    with torch.device("meta"):
        model = NGTForCausalLM(NGTConfig(**settings))
    return sum(parameter.numel() for parameter in model.parameters())
