"""What the demonstration found: numbers, their conditions, and whether they are acceptable."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from ... import __version__
from ...training.conditions import processor_name
from ...training.corpus import Corpus
from .heal import CALIBRATED, CONTROL, TITLES, Outcome
from .reload import TOLERANCE
from .settings import ACCEPTED_GAP, DemoSettings


@dataclass(frozen=True)
class DemoResults:
    """Everything that `report.html`, `results.json` and `table.md` are made of.

    `encoder`: rows of `minilm_rows`, or None without its package. `reload`: what the new process
    found. `seconds`: by stage; the host's is that of its training, reused or not.
    """

    conditions: dict[str, Any]
    host_losses: list[float]
    outcomes: dict[str, Outcome]
    encoder: list[dict[str, Any]] | None
    reload: dict[str, Any]
    seconds: dict[str, float]

    @property
    def gap(self) -> float:
        """Calibrated and healed minus host and healed, nats per byte; negative is better."""
        return self.outcomes[CALIBRATED].healed - self.outcomes[CONTROL].healed

    @property
    def problems(self) -> list[str]:
        """Why the run is not acceptable; empty if it is."""
        found = []
        # Written so that a loss that is not a number counts as a failure.
        if not abs(self.gap) <= ACCEPTED_GAP:
            found.append(
                f"calibrated and healed gravity is {self.gap:+.4f} nats per byte from the healed "
                f"host, at most {ACCEPTED_GAP:g} is accepted"
            )
        if not self.reload["logits_difference"] <= TOLERANCE:
            found.append(
                f"the reloaded model's logits differ by {self.reload['logits_difference']:.2e}, at "
                f"most {TOLERANCE:g} is accepted"
            )
        return found

    @property
    def verdict(self) -> str:
        if self.problems:
            return "Not accepted: " + "; ".join(self.problems) + "."
        return (
            f"Accepted: calibrated and healed, gravity is {self.gap:+.4f} nats per byte from the "
            f"host with the same LoRA budget (accepted up to {ACCEPTED_GAP:g})."
        )

    def to_json(self) -> str:
        content = {
            "accepted": not self.problems,
            "verdict": self.verdict,
            "gap_nats_per_byte": self.gap,
            "accepted_gap": ACCEPTED_GAP,
            "conditions": self.conditions,
            "seconds": self.seconds,
            "rows": [_row(outcome) for outcome in self.outcomes.values()],
            "encoder": self.encoder,
            "reload": self.reload,
            "host_losses": self.host_losses,
        }
        return json.dumps(content, indent=2) + "\n"


def run_conditions(
    settings: DemoSettings, corpus: Corpus, command: str, parameters: int
) -> dict[str, Any]:
    """No number without these beside it."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": processor_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {
            "gravity_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "corpus": corpus.description,
        "host_parameters": parameters,
        "settings": asdict(settings),
    }


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "key": outcome.key,
        "title": TITLES[outcome.key],
        "converted": outcome.converted,
        "healed": outcome.healed,
        "calibration": outcome.summary or None,
        "heads": None if outcome.report is None else list(outcome.report.rows),
        "masses_before": outcome.masses_before,
        "masses_after": outcome.masses_after,
        "heal_losses": outcome.losses,
    }
