"""What a run from scratch trains: settings that a command line and a recipe share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

ATTENTIONS = ("dot_product", "gravity")
# Of hosts that are patched; models that are gravity by construction have their own settings.
_OF_HOSTS = ("law", "mass_per", "distance", "softness")


@dataclass
class PretrainArguments:
    """What is trained, and how its attention works. Sizes are in tokens."""

    architecture: str = field(
        default="qwen2", metadata={"help": "A causal language model's model_type: ngt, qwen2, ..."}
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "Of a model with presets; of ngt: v2, reference, fixed. Overrides win."},
    )
    overrides: str = field(
        default="",
        metadata={
            "help": "Settings of its config: 'hidden_size=384,num_hidden_layers=6', or JSON."
        },
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "gravity or dot_product. gravity unless given; of leanformer, dot_product. Of "
            "ngt, dot_product is its twin; an lgt has none and is trained as it is."
        },
    )
    law: str = field(
        default="power",
        metadata={
            "help": "Law of gravity of a host such as qwen2: power or force. This, mass_per, "
            "distance and softness are overrides where a model is gravity by construction."
        },
    )
    mass_per: str = field(
        default="query_head", metadata={"help": "One mass per query_head, kv_head or layer."}
    )
    distance: str = field(default="euclidean", metadata={"help": "euclidean or lifted."})
    # This softness and this gravity_scale: scripts/experiments/from_scratch.py tune.
    softness: float = field(
        default=0.25,
        metadata={"help": "Softening at the start, in mean squared lengths of q and k."},
    )
    implementation: str = field(
        default="auto", metadata={"help": "How gravity is computed; see GravityConfig."}
    )
    gravity_scale: float | None = field(
        default=None,
        metadata={
            "help": "How much faster masses and softenings learn than weights. 100 unless given; "
            "1 in models that are gravity by construction."
        },
    )
    length: int = field(
        default=256,
        metadata={"help": "Tokens in a window; the positions of ngt and lgt unless overridden."},
    )
    validation_windows: int = field(default=512, metadata={"help": "Windows to validate on."})
    repulsion_weight: float = field(
        default=0.0,
        metadata={"help": "Of the repulsion between coordinates, in each optimiser step; 0: none."},
    )
    repulsion_interval: int = field(
        default=1, metadata={"help": "Optimiser steps between those that have it."}
    )
    detach_masses: bool = field(
        default=True, metadata={"help": "Repulsion moves coordinates only, not the masses."}
    )
    projector_interval: int = field(
        default=0,
        metadata={
            "help": "Optimiser steps between coordinates for TensorBoard's projector; 0: none."
        },
    )
    governed: bool = field(
        default=False,
        metadata={
            "help": "Govern the training: groups of weights that have converged are frozen, rates "
            "are shared. See GovernedTraining."
        },
    )
    governed_settings: str = field(
        default="",
        metadata={
            "help": 'How: JSON, or a file of it, such as \'{"hierarchy": null, "apply": '
            '"none"}\'. Names are those of GovernedTraining; null leaves a machine out.'
        },
    )

    def __post_init__(self) -> None:
        if self.attention is None and self.architecture is not None:
            # What each model is known for.
            self.attention = "dot_product" if self.architecture == "leanformer" else "gravity"
        if self.attention is not None and self.attention not in ATTENTIONS:
            raise ValueError(
                f"--attention: expected one of {list(ATTENTIONS)}, got {self.attention!r}"
            )
        for name in ("repulsion_weight", "projector_interval"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}: expected at least 0, got {getattr(self, name)}")
        if self.governed_settings and not self.governed:
            raise ValueError("--governed_settings: expected only with --governed, got them alone")
        for name in ("repulsion_interval", "length", "validation_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(self, name)}")

    def given_for_hosts(self) -> dict[str, Any]:
        """Settings of patched hosts that are not what they are unless given."""
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in _OF_HOSTS}
        return {name: value for name, value in values.items() if value != defaults[name]}
