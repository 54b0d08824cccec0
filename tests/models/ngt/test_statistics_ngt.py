"""Statistics of an NGT are the published ones, and say what causality leaves of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.ngt import NGTModel, statistics
from gravity_hf.models.ngt.statistics import gravity_statistics, parameter_statistics

from .ngt_cases import GOLDEN, IDS, padded, published, published_model, tiny

EXPECTED: dict[str, dict[str, float]] = json.loads(
    (GOLDEN / "statistics.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", EXPECTED)
def test_statistics_are_the_published_ones(case: str) -> None:
    expected = dict(EXPECTED[case])
    if case == "no_cutoff":
        del expected["radius"]
    found = gravity_statistics(published_model(case), published(case).tensors["ids"])
    own = {name: value for name, value in found.items() if not name.endswith("_causal")}
    assert own == pytest.approx(expected, rel=1e-5, abs=1e-6)


def by_hand(model: Any, ids: Tensor) -> dict[str, float]:
    """Causal means pair by pair, from head coordinates and the weights that attention returns."""
    calls: list[Any] = []
    hooks = [
        layer.attn.register_forward_pre_hook(lambda module, args: calls.append((module, *args[:2])))
        for layer in model.layers
    ]
    weights = model(ids, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    sums: dict[str, list[float]] = {}
    for (module, hidden, geometry), share in zip(calls, weights, strict=True):
        q, k = module.head_coordinates(hidden, geometry)
        for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
            g = F.softplus(module.gravity.gamma[h])
            radius_sq = F.softplus(getattr(module.gravity, "radius", torch.tensor(1e9))) ** 2
            for i in range(1, q.shape[2]):
                for j in range(i):
                    d2 = (q[b, h, i] - k[b, h, j]).square().sum()
                    sums.setdefault("dist_mean", []).append(float(d2))
                    sums.setdefault("energy_mean", []).append(float(g * d2))
                    sums.setdefault("sparsity_ratio", []).append(float(d2 > radius_sq))
                w = share[b, h, i]
                sums.setdefault("entropy_mean", []).append(float(-(w * (w + 1e-9).log()).sum()))
    return {f"{name}_causal": math.fsum(x) / len(x) for name, x in sums.items()}


LOOKS: dict[str, dict[str, Any]] = {
    "v2": {},
    "hard": {"preset": "reference", "initial_radius": 3.0},
    "log": {"preset": "fixed", "cutoff": "log", "initial_radius": 3.0},
    "asymmetric": {"shared_start": False},
    # Of its rows some are left nothing.
    "lonely": {"shared_start": False, "cutoff": "hard", "initial_radius": 5.0},
}


@pytest.mark.parametrize("name", LOOKS)
@torch.no_grad()
def test_causal_statistics_count_what_a_token_may_look_at(name: str) -> None:
    model, ids = tiny(NGTModel, **LOOKS[name]), IDS[:, :5]
    found = gravity_statistics(model, ids)
    expected = by_hand(model, ids)
    assert ("initial_radius" in LOOKS[name]) == (0 < expected["sparsity_ratio_causal"] < 1)
    assert {x: found[x] for x in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(side: str) -> None:
    model = tiny(preset="reference", initial_radius=3.0)
    found = gravity_statistics(model, **padded(side))
    assert found == pytest.approx(gravity_statistics(model, IDS), rel=1e-5)
    assert 0.0 < found["sparsity_ratio_causal"] < 1.0


def test_inputs_that_are_cropped_count_as_they_are_read() -> None:
    model = tiny(preset="reference", max_position_embeddings=6)
    mask = torch.ones_like(IDS)
    found = gravity_statistics(model, IDS, mask)
    assert found == pytest.approx(gravity_statistics(model, IDS[:, -6:]), rel=1e-6)


def test_long_texts_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows, none of which is counted twice, or left out."""
    model = tiny(preset="reference")
    whole, sizes = gravity_statistics(model, IDS), []
    pieces = statistics._pieces
    monkeypatch.setattr(statistics, "_ELEMENTS", 4 * 2 * 9 * 2)
    monkeypatch.setattr(
        statistics, "_pieces", lambda call: [sizes.append(len(x)) or x for x in pieces(call)]
    )
    assert gravity_statistics(model, IDS) == pytest.approx(whole, rel=1e-6)
    assert sizes == 2 * [4, 4, 1]


def test_statistics_leave_a_model_as_it_was() -> None:
    model = tiny(preset="reference", dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    first = gravity_statistics(model, IDS)
    assert first == gravity_statistics(model, IDS), "dropout was on"
    assert [module.training for module in model.modules()] == modes
    assert all(layer.attn.gravity.observer is None for layer in model.model.layers)


def test_models_without_gravity_or_watched_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="without gravity. A dot-product twin has no such"):
        gravity_statistics(tiny(attention="dot_product"), IDS)
    model, watcher = tiny(), object()
    model.model.layers[1].attn.gravity.observer = watcher  # type: ignore[assignment]
    with pytest.raises(ValueError, match="expected a model that nobody watches"):
        gravity_statistics(model, IDS)
    assert model.model.layers[1].attn.gravity.observer is watcher


def test_parameter_statistics_are_of_the_parameters() -> None:
    model = tiny(cutoff="hard")
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.attn.gravity.gamma.copy_(torch.tensor([0.0, 2.0 * index]))
            layer.attn.gravity.radius.fill_(float(index))
            layer.attn.gravity.mass_exponent.fill_(float(index))
    gammas = F.softplus(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    masses = F.softplus(model.model.mass_emb.weight)
    assert parameter_statistics(model) == pytest.approx(
        {
            "ngt/gamma_mean": gammas.mean().item(),
            "ngt/gamma_std": gammas.std(correction=0).item(),
            "ngt/radius_mean": F.softplus(torch.tensor([0.0, 1.0])).mean().item(),
            "ngt/softening_mean": model.config.softening,
            "ngt/mass_exponent_mean": 0.5,
            "ngt/mass_mean": masses.mean().item(),
            "ngt/mass_std": masses.std(correction=0).item(),
        },
        rel=1e-5,
    )
    assert parameter_statistics(tiny(attention="dot_product")) == {}
    assert set(parameter_statistics(tiny(preset="reference", token_masses=False))) == {
        *("ngt/gamma_mean", "ngt/gamma_std", "ngt/radius_mean", "ngt/bias_mean")
    }
