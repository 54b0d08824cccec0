"""What the attention of an LGT stream did in a forward, caught while it ran."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...layers.forces import force_statistics
from ...layers.observing import ObservedCall

# Query rows of each layer whose forces are looked at, evenly spaced.
_ROWS = 64


class _Ears:
    """An observer that keeps the call, and lets whoever watched before go on watching."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.call: ObservedCall | None = None

    def attend(self, call: ObservedCall) -> tuple[Tensor, Tensor | None]:
        self.call = call
        return call.gravity() if self.before is None else self.before.attend(call)


class StreamWatch:
    """Watches the layers of an `LGTModel` while it is entered; `report` says what they did."""

    def __init__(self, stream: PreTrainedModel) -> None:
        self.stream = stream
        self._ears: list[_Ears] = []
        self._outputs: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> StreamWatch:
        for index, layer in enumerate(self.stream.layers):
            gravity = layer.attn.gravity
            gravity.observer = ears = _Ears(gravity.observer)
            self._ears.append(ears)
            self._hooks.append(layer.register_forward_hook(self._keeper(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for layer, ears in zip(self.stream.layers, self._ears, strict=True):
            layer.attn.gravity.observer = ears.before
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def report(self, output: Tensor) -> dict[str, Any]:
        """Published keys with the published meaning, and what attention really did.

        `layers`: of each, `mean_force`, `mean_mass`, `curvature_active`, `hawking_limit`, `seq_len`
        and `per_head`, in which masses are those of the layer's output, `mean_force = |G|
        mean_mass^2` knows no distance, and the layer's own two are those of head 0; besides,
        those of `force_statistics`, of the forces that acted. `final_norm_stats`: of `output`
        `[B, N, d]`.
        """
        curvature = float(self.stream.config.curvature)
        layers = [self._layer(index, curvature) for index in range(len(self._ears))]
        mean, std = statistics(output)
        stats = {"mean": mean, "std": std}
        return {"layers": layers, "curvature": curvature, "final_norm_stats": stats}

    def _layer(self, index: int, curvature: float) -> dict[str, Any]:
        masses = self.stream.layers[index].attn.gravity(self._outputs[index])
        means = masses.mass.mean((0, 2)).tolist()
        per_head = {
            f"head_{head}": {
                "mean_mass": mean,
                "mean_force": strength * mean**2,
                "G": strength,
                "curvature": curvature,
            }
            for head, (mean, strength) in enumerate(
                zip(means, masses.strength.tolist(), strict=True)
            )
        }
        first = per_head["head_0"]
        return {
            "layer": index,
            "mean_force": first["mean_force"],
            "mean_mass": first["mean_mass"],
            "curvature_active": curvature > 0,
            "hawking_limit": self.stream.config.max_force,
            "seq_len": self._outputs[index].shape[1],
            "per_head": per_head,
            **_acted(self._ears[index].call),
        }

    def _keeper(self, index: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._outputs[index] = output.hidden.detach()

        return keep


def _acted(call: Any) -> dict[str, float]:
    """Of the forces of one call, over the pairs that are visible."""
    total = call.query_count()
    rows = torch.linspace(0, total - 1, min(total, _ROWS)).round().long()
    sample = call.rows(rows.to(call.masses().device))
    return force_statistics(sample.force, sample.score, sample.visible, call.max_force)


def statistics(x: Tensor) -> tuple[float, float]:
    """Mean and unbiased standard deviation of all numbers in `x`."""
    x = x.detach().float()
    return float(x.mean()), float(x.std())


def snapshot_of(model: Any, name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """The published snapshot of one stream; `timestamp` in seconds of UNIX time."""
    config = model.stream(name).config
    settings = {
        "dim_model": config.hidden_size,
        "curvature": float(config.curvature),
        "num_layers": config.num_hidden_layers,
    }
    return {"timestamp": time.time(), "model_config": settings, "attention_metrics": metrics}
