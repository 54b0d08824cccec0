"""A model's view of its own forces: measured in the forward that ran, logged, and judged."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .ledger import Ledger
from .mirror_report import MirrorReport, mirrored
from .watching import Watch, watching

_LOGGED = ("mean_force", "mean_mass", "curvature_active", "hawking_limit")
# Where they are known: not in diagnostics of the published form.
_LOGGED_TOO = ("name", "max_force", "saturation", "entropy")


class MirrorLayer:
    """Judges a model by the mean force of its layers, and measures that force.

    The published mean force was `|G| mean_mass^2`, which is none: no distance enters, and a
    threshold of 40 could hardly be reached. `report` compares the true mean, over the pairs that
    attention looks at, as the cap leaves it: at most `max_force`, 50 in published models.

    Args:
        ledger: where layers and corrections are logged; its own where None.
        max_force_threshold: above it a correction is asked for. Force, no unit; positive.
        stability_window: over how many layers, the latest, `stability_score` looks back.
        correction_callback: called as `callback(layer, "attention_dampening")`.
        rows: how many query rows, evenly spaced, a report is computed from; None: all.

    Example:
        >>> mirror = MirrorLayer(max_force_threshold=10.0)
        >>> with mirror.watch(model):
        ...     output = model(**inputs)
        >>> mirror.report().layers[0].mean_force, mirror.stability_score()
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        max_force_threshold: float = 40.0,
        stability_window: int = 20,
        correction_callback: Callable[[int, str], None] | None = None,
        *,
        rows: int | None = 64,
    ) -> None:
        if not max_force_threshold > 0:
            raise ValueError(
                f"MirrorLayer: max_force_threshold: expected a positive force, got "
                f"{max_force_threshold!r}"
            )
        for name, value in (("stability_window", stability_window), ("rows", rows)):
            if value is not None and value < 1:
                raise ValueError(f"MirrorLayer: {name}: expected at least 1, got {value!r}")
        self.ledger = Ledger(agent_id="mirror_layer") if ledger is None else ledger
        self.max_force_threshold = max_force_threshold
        self.stability_window = stability_window
        self.correction_callback = correction_callback
        self.rows = rows
        self._history: deque[float] = deque(maxlen=stability_window)
        self._watch = Watch()
        self._report: tuple[int, MirrorReport] | None = None

    def __call__(self, layer_idx: int, diag: Mapping[str, Any]) -> None:
        """Take note of one layer: log `mirror_layer`, and `containment_correction` where its
        `mean_force` is above the threshold or not finite."""
        force = float(diag.get("mean_force", 0.0))
        self._history.append(force)
        seen = {name: diag.get(name) for name in _LOGGED} | {"mean_force": force}
        more = {name: diag[name] for name in _LOGGED_TOO if name in diag}
        record = {"layer": layer_idx, **seen, "stability_score": self.stability_score(), **more}
        self.ledger.log("mirror_layer", record)
        if force <= self.max_force_threshold:
            return
        self.ledger.log(
            "containment_correction",
            {
                "layer": layer_idx,
                "trigger": "max_force_exceeded",
                "value": force,
                "threshold": self.max_force_threshold,
                "correction": "attention_dampening",
            },
        )
        if self.correction_callback is not None:
            self.correction_callback(layer_idx, "attention_dampening")

    def stability_score(self) -> float:
        """`1 / (1 + mean force / threshold)` of the latest layers: 1 without force, 0.5 at the
        threshold, 0 where a force was not finite."""
        if not self._history:
            return 1.0
        mean = sum(self._history) / len(self._history)
        if not math.isfinite(mean):
            return 0.0
        return 1.0 if mean <= 0 else 1.0 / (1.0 + mean / self.max_force_threshold)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[MirrorLayer]:
        """While forwards of `model` are kept, for `report`: references to what each attention
        module attended with in the last forward, until the next forward or the report.

        Raises:
            TypeError: `model` has no gravity attention.
            RuntimeError: somebody else watches it.
        """
        self._watch, self._report = Watch(), None
        with watching(model, self._watch):
            yield self

    def report(self) -> MirrorReport:
        """Statistics of the last watched forward, which also become this mirror's notes (see
        `__call__`), once: asked again about one forward it gives the same report.

        Raises:
            RuntimeError: no forward was watched, or none that reached gravity attention.
        """
        forward = self._watch.forwards
        if self._report is not None and self._report[0] == forward:
            return self._report[1]
        if not self._watch.calls:
            raise RuntimeError(
                "MirrorLayer.report: expected a forward to look back at, got none. Call the model "
                "itself (not a part of it) under: with mirror.watch(model): ..."
            )
        layers = [mirrored(i, seen, self.rows) for i, seen in enumerate(self._watch.calls)]
        report = MirrorReport(tuple(layers))
        self._watch.calls.clear()
        self._report = (forward, report)
        for layer in layers:
            self(layer.layer, layer.diagnostic())
        return report
