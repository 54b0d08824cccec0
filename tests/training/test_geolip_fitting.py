"""The loop for data in memory: by seed, two rates, and noise that never reaches the target."""

from __future__ import annotations

import pytest
import torch
from training.geolip_training_cases import WIDTH, ragged_rows, small_geolip

from gravity_hf.training.geolip.fitting import batches_of, fit, rows_of
from gravity_hf.training.geolip.groups import geolip_param_groups
from gravity_hf.training.geolip.noise import noisy_rows, with_noise
from gravity_hf.training.geolip.synthetic import synthetic_images

ROWS = ragged_rows()


def fitted(**options):
    model = small_geolip()
    losses = fit(model, ROWS, **{"steps": 4, "batch_size": 4, "warmup": 1, **options})
    return losses, model.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_fit_is_decided_by_its_seed():
    losses, state = fitted(denoise=0.5)
    torch.randn(3)
    again, other = fitted(denoise=0.5), fitted(denoise=0.5, seed=1)
    assert losses == again[0] and same(state, again[1])
    assert losses != other[0] and not same(state, other[1])


def test_a_fit_learns_what_it_is_shown():
    losses = fit(small_geolip(), ROWS, steps=150, batch_size=12, lr=1e-2)
    assert len(losses) == 150 and losses[-1] < 0.5 * losses[0]


def test_images_are_rows_as_they_come():
    model = small_geolip(patch_dim=None, patch_size=4)
    assert len(fit(model, synthetic_images("waves", 4, 8), steps=2, batch_size=2)) == 2


def test_the_mode_is_what_it_was():
    model = small_geolip().eval()
    fit(model, ROWS, steps=1, batch_size=4)
    assert not model.training


def test_alphas_have_their_own_rate_and_nothing_decays():
    model = small_geolip(alpha_lr_multiplier=10.0)
    weights, alphas = geolip_param_groups(model, 1e-3)
    assert [id(p) for p in alphas["params"]] == [
        id(p) for name, p in model.named_parameters() if name.endswith("alpha_logits")
    ]
    assert (weights["lr"], alphas["lr"]) == (1e-3, 1e-2)
    assert weights["weight_decay"] == alphas["weight_decay"] == 0
    assert len(weights["params"]) + len(alphas["params"]) == len(list(model.parameters()))


def test_a_model_without_spectral_layers_has_one_group():
    assert len(geolip_param_groups(small_geolip(use_spectral=False), 1e-3)) == 1


def test_noise_is_in_units_of_each_feature_and_not_in_the_target():
    model = small_geolip()
    std = torch.arange(1.0, WIDTH + 1)
    model.set_feature_statistics(torch.zeros(WIDTH), std)
    clean = torch.zeros(40, 50, WIDTH)
    batch = {"patches": clean, "labels": clean.clone()}
    noisy = with_noise(model, batch, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(noisy["labels"], clean) and torch.equal(batch["patches"], clean)
    torch.testing.assert_close(noisy["patches"].std((0, 1)), 0.5 * std, rtol=0.05, atol=0)


def test_held_out_noise_is_the_same_at_each_reading():
    model = small_geolip()
    rows, again = (noisy_rows(model, ROWS, 1.0, seed=4) for _ in range(2))
    assert all(torch.equal(a["patches"], b["patches"]) for a, b in zip(rows, again, strict=True))
    assert all(torch.equal(a["labels"], b["patches"]) for a, b in zip(rows, ROWS, strict=True))


def test_labels_are_what_is_learned():
    labels = [{"patches": torch.ones_like(row["patches"])} for row in ROWS]
    (batch,) = batches_of(ROWS, 12, labels)
    valid = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][valid], torch.ones(int(valid.sum()), WIDTH))
    model = small_geolip()
    fit(model, ROWS, steps=80, batch_size=12, lr=1e-2, labels=labels)
    assert model(**batch).loss < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 13},
        {"batch_size": 0},
        {"steps": 0},
        {"lr": 0.0},
        {"denoise": -1.0},
        {"labels": ROWS[:3]},
    ],
)
def test_what_cannot_be_fitted_is_said_before(wrong):
    model = small_geolip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="fit"):
        fit(model, ROWS, **{"steps": 2, "batch_size": 4, **wrong})
    assert same(before, model.state_dict())


def test_numbers_that_are_not_finite_end_the_fit():
    rows = rows_of(ROWS)
    rows[0]["patches"] = torch.full_like(rows[0]["patches"], torch.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(small_geolip(), rows, steps=2, batch_size=12)
