"""The verdict's numbers are those of all valid tokens, batch by batch, and JSON has all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.geolip import (
    GeolipCollator,
    GeolipConfig,
    GeolipForReconstruction,
    Verdict,
)
from gravity_hf.models.geolip.frames import frame_deviation
from gravity_hf.models.geolip.verdict import alpha_drift, compute_verdict, mechanism_of

CONFIG: dict[str, Any] = {"patch_dim": 6, "num_rows": 8, "hidden_size": 12, "feature_norm": "none"}
COLLATE = GeolipCollator()


def attentive(**settings: Any) -> GeolipForReconstruction:
    """A new model whose spectral layers, and through them contexts, change much."""
    model = GeolipForReconstruction(GeolipConfig(**{**CONFIG, **settings}))
    for layer in model.spectral.layers:
        torch.nn.init.constant_(layer.alpha_logits, 3.0)
        torch.nn.init.normal_(layer.out_proj.weight)
    torch.nn.init.normal_(model.decoder.proj_out.weight)
    return model


def same(verdict: Verdict) -> dict[str, Any]:
    """What another way to batch the same tokens may change in the last digits only."""
    return pytest.approx(numbers(verdict), rel=1e-5, abs=1e-6)


def numbers(verdict: Verdict) -> dict[str, Any]:
    words = ("mechanism", "steps")
    return {name: value for name, value in verdict.to_dict().items() if name not in words}


def rows(*lengths: int) -> list[dict[str, Tensor]]:
    return [{"patches": torch.randn(n, 6), "labels": torch.randn(n, 6)} for n in lengths]


def loss(model: GeolipForReconstruction, batch: dict[str, Tensor], swap: bool) -> float:
    with torch.no_grad():
        return float(model.forward_patches(**batch, swap_context=swap).loss)


def test_numbers_are_those_of_all_valid_tokens() -> None:
    model, data = attentive(), rows(3, 5, 2)
    batch = COLLATE(data)
    verdict = compute_verdict(model, [batch], steps=7)
    with torch.no_grad():
        out = model(**batch, output_frames=True)
    valid = batch["attention_mask"] != 0
    found, target = out.reconstruction[valid], batch["labels"][valid]
    deviation = frame_deviation(out.frame[valid])
    assert verdict.recon_mse == pytest.approx(float((found - target).square().mean()), rel=1e-5)
    cosine = F.cosine_similarity(found, target).mean()
    assert verdict.recon_cosine == pytest.approx(float(cosine), rel=1e-5)
    assert verdict.frame_deviation == pytest.approx(float(deviation.mean()), rel=1e-9)
    assert verdict.frame_deviation_absmax == pytest.approx(float(deviation.abs().max()), rel=1e-9)
    inside = (deviation.abs() < 0.04).double().mean()
    assert (verdict.frac_in_envelope, verdict.dev_critical) == (float(inside), 0.04)
    assert verdict.in_envelope == (abs(verdict.frame_deviation) < 0.04)
    assert verdict.lens_orthogonality_error < 1e-6 and verdict.lens_angle_error < 1e-6
    assert verdict.omega_energy_error < 1e-5
    assert (verdict.tokens, verdict.steps) == (10, 7)
    assert verdict.n_params == model.num_parameters()
    alphas = model.alphas()
    assert verdict.mean_alpha == pytest.approx(float(alphas.mean()), rel=1e-6)
    assert verdict.alpha_init == pytest.approx(0.0238406, abs=1e-6)
    assert verdict.alpha_ratio == pytest.approx(verdict.mean_alpha / verdict.alpha_init)


@pytest.mark.parametrize("kind", ["mse", "cosine", "cosine_mse"])
def test_the_gain_compares_the_loss_of_the_task(kind: str) -> None:
    model, batch = attentive(reconstruction_loss=kind, rigidity_weight=100.0), COLLATE(rows(4, 4))
    model.config.rigidity_weight = 0.0  # contexts do not change frames
    plain, swapped = loss(model, batch, False), loss(model, batch, True)
    model.config.rigidity_weight = 100.0
    verdict = compute_verdict(model, [batch])
    assert abs(swapped - plain) > 1e-4
    assert verdict.coordination_gain == pytest.approx((swapped - plain) / plain, rel=1e-3)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_batches_of_any_size_give_the_same_numbers(causal: bool) -> None:
    model, data = attentive(is_causal=causal), rows(4, 4, 4, 4, 4)
    together = compute_verdict(model, [COLLATE(data[:2]), COLLATE(data[2:])])
    alone = compute_verdict(model, [COLLATE([row]) for row in data])
    assert numbers(alone) == same(together)


def test_a_sample_that_comes_alone_takes_its_context_from_those_before() -> None:
    model, data = attentive(), rows(4, 3, 2)
    split = compute_verdict(model, [COLLATE(data[:2]), COLLATE(data[2:])])
    assert numbers(split) == same(compute_verdict(model, [COLLATE(data)]))
    with pytest.raises(ValueError, match="two samples or more"):
        compute_verdict(model, [COLLATE(data[:1])])


def test_padding_changes_nothing() -> None:
    model, data = attentive(), rows(4, 3)
    batch = COLLATE(data)
    changed = {name: value.clone() for name, value in batch.items()}
    changed["patches"][1, 3] = 100.0
    changed["labels"][1, 3] = -100.0
    wide = {name: torch.cat([value, value], 1) for name, value in batch.items()}
    wide["attention_mask"][:, 4:] = 0
    expected = compute_verdict(model, [batch])
    for other in (changed, wide):
        assert numbers(compute_verdict(model, [other])) == same(expected)


def test_what_a_causal_model_cannot_see_makes_no_gain() -> None:
    data = rows(1, 1, 1)
    assert compute_verdict(attentive(), [COLLATE(data)]).coordination_gain == 0.0
    model, pair = attentive(is_causal=True), COLLATE(rows(3, 3))
    # The last tokens of a sample are seen by none but themselves.
    other = {name: value.clone() for name, value in pair.items()}
    other["patches"][:, 2] += 1.0
    pair["attention_mask"][:, 2] = other["attention_mask"][:, 2] = 0
    gains = {compute_verdict(model, [batch]).coordination_gain for batch in (pair, other)}
    assert len(gains) == 1 and gains != {0.0}


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smoothed"])
def test_images_with_clean_labels_are_measured_as_the_model_reconstructs_them(smooth: bool) -> None:
    model = attentive(patch_dim=None, patch_size=2, num_channels=1, boundary_smooth=smooth)
    if smooth:
        torch.nn.init.normal_(model.smooth.conv2.weight)
    batch = {"pixel_values": torch.randn(3, 1, 4, 6), "labels": torch.randn(3, 1, 4, 6)}
    verdict = compute_verdict(model, [batch])
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert verdict.recon_mse == pytest.approx(expected, rel=1e-5)
    assert verdict.coordination_gain != 0.0


def test_a_model_without_spectral_layers_is_b_and_has_no_alphas() -> None:
    model = GeolipForReconstruction(GeolipConfig(**CONFIG, use_spectral=False))
    verdict = compute_verdict(model, [COLLATE(rows(3))])
    content = verdict.to_dict()
    alphas = ("mean_alpha", "alpha_min", "alpha_max", "alpha_init", "alpha_ratio")
    assert [content[name] for name in alphas] == [None] * 5
    assert (verdict.mechanism, verdict.alpha_drift, verdict.coordination_gain) == ("B", False, 0.0)


def test_random_frames_stand_beside_as_many_as_were_measured() -> None:
    model = attentive(num_rows=32)
    verdict = compute_verdict(model, [COLLATE([{"patches": torch.randn(400, 6)}] * 2)])
    # Of random frames of 32 rows in 4 dimensions the deviation has a spread of 0.0145.
    assert verdict.random_frac_in_envelope == pytest.approx(0.985, abs=0.01)
    assert 0.04 < verdict.random_deviation_absmax < 0.12
    again = compute_verdict(model, [COLLATE([{"patches": torch.randn(400, 6)}] * 2)])
    assert again.random_deviation_absmax == verdict.random_deviation_absmax


def test_a_verdict_goes_through_json_and_config(tmp_path: Any) -> None:
    model = attentive()
    verdict = model.verdict([COLLATE(rows(3, 3))])
    model.config.verdict = verdict.to_dict()
    model.save_pretrained(tmp_path)
    loaded = GeolipConfig.from_pretrained(tmp_path)
    assert Verdict(**loaded.verdict) == verdict
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_the_model_stays_in_its_mode_and_batches_are_read_one_by_one() -> None:
    model, taken = attentive().train(), []
    model.decoder.eval()

    def stream() -> Iterator[dict[str, Tensor]]:
        for i in range(4):
            taken.append(i)
            yield COLLATE(rows(2, 2))

    modes = [module.training for module in model.modules()]
    compute_verdict(model, stream())
    assert [module.training for module in model.modules()] == modes
    assert taken == [0, 1, 2, 3]

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from stream()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_verdict(model, broken())
    assert [module.training for module in model.modules()] == modes


def test_what_cannot_be_measured_is_an_error() -> None:
    model = attentive()
    with pytest.raises(ValueError, match="one valid token"):
        compute_verdict(model, [])
    with pytest.raises(ValueError, match="patches or pixel_values, got \\['input_ids'\\]"):
        compute_verdict(model, [{"input_ids": torch.zeros(2, 2)}])
    with torch.no_grad():
        model.decoder.proj_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite numbers.*recon_cosine"):
        compute_verdict(model, [COLLATE(rows(2, 2))])


@pytest.mark.parametrize(
    ("gain", "ratio", "mechanism", "drifts"),
    [
        (0.01, 1.10, "A", False),
        (0.0099, 1.2, "B", True),
        (0.5, 1.09, "B", False),
        (-0.1, 0.9, "B", False),
        (0.0, None, "B", False),
    ],
    ids=["both", "drift", "gain-alone", "neither", "no-layers"],
)
def test_mechanism_a_needs_gain_and_alpha(
    gain: float, ratio: float | None, mechanism: str, drifts: bool
) -> None:
    config = GeolipConfig(**CONFIG)
    assert mechanism_of(gain, ratio, config) == mechanism
    assert alpha_drift(gain, ratio, config) is drifts
