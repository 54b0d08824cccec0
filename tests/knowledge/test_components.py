"""Parts of a confidence against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gravity_hf.knowledge.components import (
    components,
    confidence_features,
    mean_pair_score,
    pair_score,
    uncalibrated,
    validation_record,
)
from gravity_hf.knowledge.confidence import FEATURES
from gravity_hf.knowledge.delta import LowRankDelta


def _delta(**rows):
    factors = {}
    for name, row in rows.items():
        A = torch.tensor([row], dtype=torch.float32)
        factors[name] = (A, torch.ones(3, 1))
    return LowRankDelta(factors)


def test_pairs_are_judged_by_the_map_where_they_are_closest():
    one = _delta(x=[1.0, 0.0], y=[1.0, 0.0])
    diagonal = _delta(x=[0.0, 1.0], y=[1.0, 1.0])
    assert pair_score(one, diagonal) == pytest.approx(0.5)
    assert pair_score(one, _delta(x=[0.0, 2.0])) == pytest.approx(1.0)
    assert pair_score(one, _delta(y=[5.0, 0.0])) == pytest.approx(0.0, abs=1e-6)
    # Maps that only one of them changes say nothing.
    assert pair_score(one, _delta(z=[1.0, 0.0])) == 1.0
    assert mean_pair_score([one]) == mean_pair_score([]) == 1.0
    third = _delta(x=[0.0, 1.0])
    assert mean_pair_score([one, diagonal, third]) == pytest.approx((0.5 + 1.0 + 0.0) / 3, abs=1e-6)


def test_components_follow_their_formulas():
    found = components([0.8, 0.4], pairs=0.5, active=100)
    assert found["routing"] == pytest.approx(0.8)
    assert found["coherence"] == pytest.approx(0.7 * 0.5 + 0.3 / (1 + 10 * 0.04))
    assert found["coverage"] == pytest.approx(0.6 * 0.6 + 0.4 * 2 / 5)
    assert uncalibrated(found) == pytest.approx(
        0.4 * 0.8 + 0.3 * found["coherence"] + 0.3 * found["coverage"]
    )
    # A store of two beliefs cannot give more than two.
    assert components([0.8, 0.4], 0.5, 2)["coverage"] == pytest.approx(0.6 * 0.6 + 0.4)
    assert components([0.5], 0.0, 9)["coherence"] == 1.0
    assert components([], 1.0, 9) == {"routing": 0.0, "coherence": 0.0, "coverage": 0.0}
    assert all(0 <= value <= 1 for value in components([-0.5, 3.0], 1.0, 9).values())


def test_features_are_those_that_the_model_is_fitted_on():
    parts = components([0.8, 0.5], 0.25, 10)
    found = confidence_features([0.8, 0.6], [0.8, 0.5], 0.25, parts, 0.9, 1.5)
    assert tuple(found) == FEATURES
    assert found["best_similarity"] == 0.8
    assert found["margin"] == pytest.approx(0.2)
    assert found["routed"] == 2.0
    assert found["coherence"] == 0.25
    assert found["coverage"] == parts["coverage"]
    assert found["validation"] == 0.9
    assert found["first_token_kl"] == pytest.approx(math.log(2.5))


def test_features_are_finite_without_anything():
    found = confidence_features([], [], 1.0, components([], 1.0, 0), 0.0, 0.0)
    assert set(found.values()) == {0.0}
    alone = confidence_features([0.7], [0.7], 1.0, components([0.7], 1.0, 1), 0.0, 0.0)
    assert alone["margin"] == 0.7


def test_the_validation_record_is_a_probability():
    assert validation_record({"answer_logprob_after": math.log(0.25)}) == pytest.approx(0.25)
    assert validation_record({"answer_logprob_after": 0.1}) == 1.0
    assert validation_record({}) == validation_record(None) == 0.0
