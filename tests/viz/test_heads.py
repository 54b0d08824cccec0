"""The numbers behind the figures of heads are the law's, and those of pairs that really occur."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import tiny_host

from gravity_hf import measure_attention
from gravity_hf.layers.parameters import GravityTerms
from gravity_hf.ops.reference import gravity_attention_reference, squared_distance
from gravity_hf.viz.curves import curve_of
from gravity_hf.viz.heads import FRACTIONS, HeadStatistics, Spread, measure_heads
from gravity_hf.viz.recording import first_example, record_attention


@pytest.mark.parametrize("law", ["force", "power"])
def test_the_curve_is_the_law_of_the_reference(law: str) -> None:
    head = HeadStatistics("a", 0, law, 1.7, 0.3, (0.5, 1.0, 2.0, 3.0, 5.0), 2.0, 0.0)
    distance_sq, score = curve_of(head)
    # A query at the origin and keys on a line, at these distances from it.
    keys = torch.zeros(1, 1, len(distance_sq), 2, dtype=torch.float64)
    keys[0, 0, :, 0] = distance_sq.sqrt()
    terms = {"mass": torch.tensor([1.7]).double(), "eps": torch.tensor([0.3]).double()}
    reference = gravity_attention_reference(
        torch.zeros_like(keys[:, :, :1]), keys, keys, law=law, **terms
    )
    torch.testing.assert_close(score.softmax(-1), reference.weights[0, 0, 0])


def test_the_curve_covers_what_occurs_and_no_negative_distance() -> None:
    head = HeadStatistics("a", 0, "force", 1.0, 0.1, (0.1, 1.0, 2.0, 3.0, 5.0), 2.0, 0.0)
    distance_sq, _ = curve_of(head)
    assert 0.0 <= distance_sq[0] < 0.1
    assert distance_sq[-1] > 5.0


def test_hidden_pairs_do_not_count_in_quantiles() -> None:
    """Squared distances 1 to 100, of which the mask shows 1 to 50."""
    keys = torch.arange(1.0, 101.0).sqrt().reshape(1, 1, 100, 1)
    mask = (torch.arange(100) < 50).reshape(1, 1, 1, 100)
    terms = GravityTerms(torch.ones(1), torch.full((1,), 0.1), None)
    spread = Spread(terms, "force", torch.tensor([100.0], dtype=torch.float64))
    spread.see(torch.zeros(1, 1, 1, 1), keys, mask, 1.0)
    expected = [fraction * 50 for fraction in FRACTIONS]
    assert spread.quantiles()[0].tolist() == pytest.approx(expected, abs=1.0)


def test_quantiles_are_those_of_real_tokens(case) -> None:
    """Against every pair of each row alone, without its padding."""
    heads = measure_heads(case.model, [case.batch], progress=False)
    rows = [{k: v[i : i + 1] for k, v in case.batch.items()} for i in range(2)]
    recorded = [record_attention(case.model, first_example(row, 99)) for row in rows]
    for name, statistics in heads.items():
        for head in statistics:
            pairs = []
            for row in recorded:
                seen = row[name]
                here = squared_distance(seen.query[None], seen.key[None], seen.key_radius_sq)[0]
                pairs.append(here[head.head][seen.visible[head.head]])
            values = torch.cat(pairs).double()
            # Between neighbours in a sample, any value is a quantile; the histogram has bins.
            expected = [
                torch.quantile(values, torch.tensor(FRACTIONS).double(), interpolation=way)
                for way in ("lower", "higher")
            ]
            slack = 2e-3 * values.max()
            measured = torch.tensor(head.distances)
            assert (measured >= expected[0] - slack).all()
            assert (measured <= expected[1] + slack).all()


def test_contrast_and_divergence_are_those_that_are_reported(case) -> None:
    report = measure_attention(case.model, [case.batch], progress=False)
    heads = [
        h for row in measure_heads(case.model, [case.batch], progress=False).values() for h in row
    ]
    assert [(h.layer, h.head) for h in heads] == [(r["layer"], r["head"]) for r in report.rows]
    for field, key in (("contrast", "contrast"), ("divergence", "kl"), ("mass", "mass")):
        assert [getattr(h, field) for h in heads] == pytest.approx([r[key] for r in report.rows])


def test_measuring_changes_nothing(case) -> None:
    before = copy.deepcopy(case.model.state_dict())
    measure_heads(case.model, [case.batch], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())


def test_a_plain_model_has_no_heads_to_measure() -> None:
    with pytest.raises(RuntimeError, match="patch_with_gravity"):
        measure_heads(tiny_host("qwen2"), [])
