"""The settings of a gravity model: frozen, strict, versioned, stored as `config.gravity`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

LAWS = ("force", "power")
DISTANCES = ("euclidean", "lifted")
MASS_GRANULARITIES = ("query_head", "kv_head", "layer")
IMPLEMENTATIONS = ("auto", "reference", "chunked", "flex", "triton")

# Below this a float32 distance is rounding noise for vectors of ordinary size: see ops/README.md.
EPSILON_FLOOR = 1e-6
CONFIG_VERSION = 1


@dataclass(frozen=True)
class GravityConfig:
    """How attention is computed in a patched model. The defaults are the constants of Gravity-2.

    Args:
        epsilon: softening, in units of squared distance. Used by every head that has no softening
            of its own. At least `EPSILON_FLOOR`.
        mass_init: initial value of `mass_log`; the mass is `softplus(mass_log)`.
        mass_per: one mass per `"query_head"`, per `"kv_head"` (shared by the query heads that read
            it) or per `"layer"`.
        law: `"force"`: score `M^2 / (d^2 + eps)`; `"power"`: score `-M^2 ln(d^2 + eps)`.
        distance: `"euclidean"`: `|q - k|^2`; `"lifted"`: keys carry one more coordinate that puts
            them on a sphere, `|q|^2 + R^2 - 2 q.k`. Lifted radii come from data: see `calibrate`.
        learn_softening: every query head has a trainable softening `softplus(softening_log)`.
        layers: indices of the attention modules to convert, in the order in which the model lists
            them; `None` converts all. The others keep dot-product attention.
        implementation: how the operator is computed: `"auto"` chooses by device; `"reference"` and
            `"chunked"` run everywhere, `"flex"` and `"triton"` refuse what they cannot serve.
        softness: the softness that `calibrate` used, the largest of any head where it chose one for
            each; `None` if the model was not calibrated.
        max_kl: the budget that `calibrate` kept, mean KL to the host's attention in nats per query
            row; `None` without one.
        version: version of this block.

    Raises:
        ValueError: a value outside its range, an unknown name, or a newer version.
    """

    epsilon: float = 0.1
    mass_init: float = 0.5
    mass_per: str = "query_head"
    law: str = "force"
    distance: str = "euclidean"
    learn_softening: bool = False
    layers: tuple[int, ...] | None = None
    implementation: str = "auto"
    softness: float | None = None
    max_kl: float | None = None
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        _require_number("epsilon", self.epsilon, EPSILON_FLOOR)
        _require_number("mass_init", self.mass_init, -math.inf)
        _require_choice("mass_per", self.mass_per, MASS_GRANULARITIES)
        _require_choice("law", self.law, LAWS)
        _require_choice("distance", self.distance, DISTANCES)
        _require_choice("implementation", self.implementation, IMPLEMENTATIONS)
        if not isinstance(self.learn_softening, bool):
            raise ValueError(_message("learn_softening", "True or False", self.learn_softening))
        if self.softness is not None:
            _require_number("softness", self.softness, 0.0)
        if self.max_kl is not None:
            _require_number("max_kl", self.max_kl, 0.0)
            if self.max_kl == 0:
                raise ValueError(_message("max_kl", "a finite number > 0", self.max_kl))
        if self.layers is not None:
            object.__setattr__(self, "layers", _layer_indices(self.layers))
        if isinstance(self.version, bool) or self.version != CONFIG_VERSION:
            raise ValueError(
                _message("version", f"{CONFIG_VERSION}", self.version)
                + "; a newer checkpoint needs a newer gravity_hf: pip install -U gravity_hf"
            )

    @property
    def softness_in_words(self) -> str:
        """How soft the model is, for people."""
        if self.softness is None:
            return "not calibrated"
        if self.max_kl is None:
            return f"softness {self.softness:g}"
        return (
            f"softness up to {self.softness:.3g}, each head's least within a KL of "
            f"{self.max_kl:g} nats to its host"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict(to_dict())` is the identity."""
        values = asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GravityConfig:
        """The inverse of `to_dict`. An unknown key is an error: a dropped key is another model."""
        if not isinstance(values, dict):
            raise ValueError(f"gravity settings: expected a dict, got {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"gravity settings: unknown {unknown}; expected only {sorted(known)}. "
                "The checkpoint may come from a newer gravity_hf: pip install -U gravity_hf"
            )
        return cls(**values)


def _message(field: str, expected: str, got: object) -> str:
    return f"GravityConfig.{field}: expected {expected}, got {got!r}"


def _require_number(field: str, value: object, minimum: float) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not math.isfinite(value) or value < minimum:  # type: ignore[arg-type,operator]
        bound = "a finite number" if minimum == -math.inf else f"a finite number >= {minimum:g}"
        raise ValueError(_message(field, bound, value))


def _require_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(_message(field, f"one of {list(choices)}", value))


def _layer_indices(layers: object) -> tuple[int, ...]:
    valid = isinstance(layers, (list, tuple)) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers
    )
    if not valid:
        raise ValueError(_message("layers", "a list of indices >= 0, or None", layers))
    return tuple(sorted(set(layers)))  # type: ignore[call-overload]
