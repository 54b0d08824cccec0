"""The confidence model and its measures, against hand computation and another optimiser."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gravity_hf.knowledge.confidence import (
    FEATURES,
    ConfidenceModel,
    auroc,
    confidence_quality,
    expected_calibration_error,
)
from gravity_hf.knowledge.errors import ValidationError


def _cases(count: int = 200, seed: int = 0) -> tuple[list[dict[str, float]], list[bool]]:
    """Right the more often the larger the best similarity; nothing else matters."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, len(FEATURES), generator=generator)
    chance = (8 * (values[:, FEATURES.index("best_similarity")] - 0.5)).sigmoid()
    labels = torch.rand(count, generator=generator) < chance
    rows = [dict(zip(FEATURES, row, strict=True)) for row in values.tolist()]
    return rows, [bool(x) for x in labels]


@pytest.fixture(scope="module")
def fitted() -> ConfidenceModel:
    return ConfidenceModel.fit(*_cases(), beliefs=[f"{i}-v1" for i in range(10)])


def test_auroc_is_the_share_of_pairs_in_order():
    scores, labels = [0.1, 0.4, 0.4, 0.8, 0.9], [False, True, False, True, False]
    # Pairs right against wrong: .4 > .1, .4 = .4, .4 < .9, .8 > .1, .8 > .4, .8 < .9.
    assert auroc(scores, labels) == (1 + 0.5 + 0 + 1 + 1 + 0) / 6
    assert auroc([1.0, 2.0], [False, True]) == 1.0
    assert auroc([1.0, 2.0], [True, False]) == 0.0
    assert auroc([1.0] * 4, [True, False, True, False]) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_auroc_equals_all_pairs_counted(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 12, (60,), generator=generator).tolist()
    labels = [bool(x) for x in torch.rand(60, generator=generator) < 0.4]
    pairs = [
        (a > b) + (a == b) / 2
        for a, x in zip(scores, labels, strict=True)
        for b, y in zip(scores, labels, strict=True)
        if x and not y
    ]
    assert auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-15)


def test_calibration_error_is_the_weighted_gap_of_ten_bins():
    probabilities = [0.05, 0.0, 0.31, 0.39, 0.95, 1.0, 0.99, 0.3]
    labels = [False, True, True, False, True, True, False, True]
    # Bins 0: mean .025, right 1/2. 3: .31 .39 .3, mean 1/3, right 2/3. 9: .95 1 .99, right 2/3.
    expected = (2 * abs(0.5 - 0.025) + 3 * abs(2 / 3 - 1 / 3) + 3 * abs(2 / 3 - 0.98)) / 8
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-15)
    assert expected_calibration_error([1.0, 0.0], [True, False]) == 0.0
    assert expected_calibration_error([1.0, 0.0], [False, True]) == 1.0
    assert expected_calibration_error([0.5, 0.5], [True, False], bins=1) == 0.0


def test_quality_of_one_kind_of_case_has_no_auroc():
    quality = confidence_quality([0.5, 1.0], [True, True])
    assert math.isnan(quality.auroc)
    assert quality.brier == 0.125
    assert (quality.cases, quality.right) == (2, 2)
    with pytest.raises(ValidationError, match="one kind"):
        auroc([0.5], [True])
    with pytest.raises(ValidationError, match="as many"):
        auroc([0.5], [True, False])


def test_the_fit_is_the_minimum_that_another_optimiser_finds():
    rows, labels = _cases(80)
    model = ConfidenceModel.fit(rows, labels, penalty=0.7)
    X = torch.tensor([[row[name] for name in FEATURES] for row in rows], dtype=torch.float64)
    X = (X - X.mean(0)) / X.std(0, correction=0)
    y = torch.tensor(labels).double()
    w = torch.zeros(len(FEATURES) + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [w],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimiser.zero_grad()
        z = X @ w[:-1] + w[-1]
        data = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
        value = data + 0.35 * w[:-1].square().sum() + 0.5e-6 * w[-1].square()
        value.backward()
        return value

    optimiser.step(loss)
    assert model.weights == pytest.approx(w[:-1].tolist(), abs=1e-6)
    assert model.intercept == pytest.approx(float(w[-1]), abs=1e-6)


def test_confidence_rises_with_the_best_similarity(fitted):
    point = dict.fromkeys(FEATURES, 0.5)
    steps = [fitted.predict(point | {"best_similarity": i / 20}) for i in range(21)]
    assert steps == sorted(steps)
    assert len(set(steps)) == 21
    assert 0 < steps[0] < 0.15
    assert 0.85 < steps[-1] < 1


def test_on_new_cases_it_tells_right_from_wrong_and_means_what_it_says(fitted):
    rows, labels = _cases(2000, seed=1)
    quality = confidence_quality([fitted.predict(row) for row in rows], labels)
    assert quality.auroc > 0.85
    assert quality.ece < 0.06
    # What the folds predicted of it.
    assert fitted.quality.auroc == pytest.approx(quality.auroc, abs=0.06)


def test_the_threshold_comes_from_cases_left_out():
    # Features of pure noise: on its own cases a model would find some order in them.
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, len(FEATURES), generator=generator).tolist()
    rows = [dict(zip(FEATURES, row, strict=True)) for row in values]
    labels = [i % 2 == 0 for i in range(40)]
    model = ConfidenceModel.fit(rows, labels, penalty=1e-3)
    own = confidence_quality([model.predict(row) for row in rows], labels)
    assert own.auroc > 0.65
    assert model.quality.auroc < 0.6


def test_the_fit_has_no_chance_in_it_but_the_folds():
    rows, labels = _cases(60)
    first, again, other = (ConfidenceModel.fit(rows, labels, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.weights == other.weights
    assert first.quality != other.quality


def test_cases_that_can_be_told_apart_fully_stay_finite():
    rows = [dict.fromkeys(FEATURES, float(i)) for i in range(20)]
    model = ConfidenceModel.fit(rows, [i >= 10 for i in range(20)], precision=1.0)
    assert all(map(math.isfinite, (*model.weights, model.intercept)))
    assert model.quality.auroc == 1.0
    assert model.predict(rows[0]) < 0.5 < model.predict(rows[-1])
    constant = ConfidenceModel.fit([dict.fromkeys(FEATURES, 1.0)] * 8, [True, False] * 4)
    assert constant.predict(dict.fromkeys(FEATURES, 1.0)) == pytest.approx(0.5)


def test_uncertain_is_below_the_threshold(fitted):
    assert fitted.uncertain(math.nextafter(fitted.point.threshold, 0))
    assert not fitted.uncertain(fitted.point.threshold)
    assert fitted.point.precision >= fitted.target == 0.95


def test_it_is_stale_when_more_than_a_tenth_changed(fitted):
    now = list(fitted.beliefs)
    assert not fitted.is_stale(now[1:])
    assert fitted.is_stale(now[2:])


def test_it_survives_json_bit_for_bit(fitted, tmp_path):
    file = tmp_path / "confidence.json"
    file.write_text(json.dumps(fitted.to_json(), allow_nan=False))
    again = ConfidenceModel.load(file)
    assert again == fitted
    row = _cases(1, seed=5)[0][0]
    assert again.predict(row) == fitted.predict(row)


def test_an_unreached_precision_survives_json_too():
    rows = [dict.fromkeys(FEATURES, 1.0)] * 8
    model = ConfidenceModel.fit(rows, [True, False] * 4)
    again = ConfidenceModel.from_json(json.loads(json.dumps(model.to_json(), allow_nan=False)))
    assert not again.point.reached
    assert math.isnan(again.point.precision)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"more": 1},
        {"weights": [1.0]},
        {"point": None},
        {"quality": {"auroc": 1.0}},
    ],
    ids=["format", "unknown", "length", "missing", "part"],
)
def test_other_json_is_refused(fitted, change):
    with pytest.raises(ValidationError, match="confidence model"):
        ConfidenceModel.from_json(fitted.to_json() | change)


def test_cases_that_teach_nothing_are_refused():
    rows, labels = _cases(10)
    with pytest.raises(ValidationError, match="two right and two wrong"):
        ConfidenceModel.fit(rows, [True] * 10)
    with pytest.raises(ValidationError, match="without 'margin'"):
        ConfidenceModel.fit([{"best_similarity": 1.0}] * 10, labels)
    with pytest.raises(ValidationError, match="finite"):
        ConfidenceModel.fit([row | {"margin": math.inf} for row in rows], labels)
