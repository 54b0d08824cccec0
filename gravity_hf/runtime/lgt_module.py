"""The runtime module around a gravity model: it processes, watches itself, and may grow."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.modes import in_evaluation
from .growth import (
    GROWTH_STEPS,
    STABILITY_THRESHOLD,
    ArchitectureChange,
    apply_architecture_change,
    can_grow,
    propose_architecture_change,
)
from .ledger import Ledger
from .mirror import MirrorLayer
from .modules import VictorOSBaseModule, victoros_module
from .watching import observed_modules

_MOST_CORRECTIONS = 1000


@victoros_module(
    name="lgt_core",
    version="0.1.0",
    requirements=["torch>=2.11", "transformers>=5.17", "numpy>=1.26"],
    containment_native=True,
    description="A gravity model with a ledger and a mirror.",
)
class LGTVictorOSModule(VictorOSBaseModule):
    """Runs a gravity model, an LGT as well as a converted host, and logs what it did.

    Args:
        model: with gravity attention.
        agent_id: who logs.
        persist_path: file of the ledger; None: in memory.
        max_force_threshold: see `MirrorLayer`.

    Raises:
        TypeError: the model has no gravity.

    Example:
        >>> module = LGTVictorOSModule(model, persist_path="run/ledger.jsonl")
        >>> result = module.process(input_ids)
        >>> result["output"].shape, result["stability"]
    """

    def __init__(
        self,
        model: nn.Module,
        agent_id: str = "lgt_core",
        persist_path: str | os.PathLike[str] | None = None,
        max_force_threshold: float = 40.0,
    ) -> None:
        if not observed_modules(model):
            raise TypeError(
                f"LGTVictorOSModule: expected a model with gravity attention, got "
                f"{type(model).__name__} without. Load a gravity model, or "
                "patch_with_gravity(model)"
            )
        self.model = model
        self.ledger = Ledger(agent_id=agent_id, persist_path=persist_path)
        self.corrections = 0
        self._latest: deque[dict[str, Any]] = deque(maxlen=_MOST_CORRECTIONS)
        self.mirror_layer = MirrorLayer(
            ledger=self.ledger,
            max_force_threshold=max_force_threshold,
            correction_callback=self._correct,
        )

    def process(
        self, x: Tensor | Mapping[str, Any], return_diagnostics: bool = True
    ) -> dict[str, Any]:
        """One forward in eval mode, without gradients; the model's mode is restored.

        Args:
            x: token ids `[B, T]`, embeddings `[B, T, d]`, or whatever the model's forward takes, by
                name: `attention_mask` among them where tokens are padded.
            return_diagnostics: watch the forces.

        Returns:
            `output` (logits where the model has them, else the last hidden state), `diagnostics`
            (None where not asked for) and `stability`.
        """
        inputs = self._inputs(x)
        with in_evaluation(self.model), torch.no_grad():
            if return_diagnostics:
                with self.mirror_layer.watch(self.model):
                    result = self.model(**inputs)
                diagnostics = self.mirror_layer.report().diagnostics()
            else:
                result, diagnostics = self.model(**inputs), None
        output, stability = _main_output(result), self.mirror_layer.stability_score()
        values = output.float()
        self.ledger.log(
            "inference",
            {
                "seq_len": _length(inputs),
                "stability_score": stability,
                "corrections": self.corrections,
                "output_mean": values.mean(),
                # One number has no spread.
                "output_std": values.std() if values.numel() > 1 else 0.0,
            },
        )
        return {"output": output, "diagnostics": diagnostics, "stability": stability}

    def get_snapshot(self, x: Tensor | Mapping[str, Any]) -> dict[str, Any]:
        """`timestamp`, `model_config` and `attention_metrics`, the diagnostics of a forward."""
        inputs = self._inputs(x)
        with in_evaluation(self.model), torch.no_grad(), self.mirror_layer.watch(self.model):
            self.model(**inputs)
        metrics = self.mirror_layer.report().diagnostics()
        config = self._config()
        self.ledger.log("snapshot", {"model_config": config})
        return {"timestamp": self.now(), "model_config": config, "attention_metrics": metrics}

    def propose_architecture_change(
        self,
        current_config: Any = None,
        stability_threshold: float = STABILITY_THRESHOLD,
    ) -> dict[str, Any] | None:
        """`growth.propose_architecture_change` at the present stability, logged. Without
        `current_config`, of the model as it is: None where it cannot grow so."""
        config = self._config() if current_config is None else current_config
        stability = self.mirror_layer.stability_score()
        proposal = propose_architecture_change(config, stability, stability_threshold)
        if proposal is not None and current_config is None:
            proposal = proposal if can_grow(self.model, proposal["change"]) else None
        if proposal is not None:
            self.ledger.log("architecture_proposal", proposal)
        return proposal

    def apply_architecture_change(
        self, proposal: Mapping[str, Any], *, steps: int = GROWTH_STEPS
    ) -> ArchitectureChange:
        """`growth.apply_architecture_change` to the model, logged."""
        return apply_architecture_change(self.model, proposal, ledger=self.ledger, steps=steps)

    def _correct(self, layer: int, kind: str) -> None:
        self.corrections += 1
        self._latest.append({"layer": layer, "type": kind, "t": self.now()})

    def _config(self) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        names = {
            "dim_model": "hidden_size",
            "curvature": "curvature",
            "num_layers": "num_hidden_layers",
        }
        known = {name: getattr(config, field, None) for name, field in names.items()}
        return {name: value for name, value in known.items() if value is not None}

    def _inputs(self, x: Tensor | Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(x, Mapping | Tensor):
            raise TypeError(
                f"LGTVictorOSModule: expected a tensor, or a mapping of them by name, got "
                f"{type(x).__name__}. Pass torch.tensor(...)"
            )
        device = next(self.model.parameters()).device
        if isinstance(x, Mapping):
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in x.items()}
        name = getattr(self.model, "main_input_name", "input_ids")
        if name == "input_ids" and x.is_floating_point():
            name = "inputs_embeds"
        return {name: x.to(device)}


def _main_output(result: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    return result if isinstance(result, Tensor) else result[0]


def _length(inputs: Mapping[str, Any]) -> int:
    """Tokens of a sequence; 1 where the input has no such axis."""
    first = next((v for v in inputs.values() if isinstance(v, Tensor)), None)
    return 1 if first is None or first.dim() < 2 else first.shape[1]
