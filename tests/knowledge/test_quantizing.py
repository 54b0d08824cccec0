"""Tiers: met with the smallest width, or refused with what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.errors import QuantizationError, UnsafeFileError
from gravity_hf.knowledge.quantized_delta import TIERS, Tier, tier_of
from gravity_hf.knowledge.quantizing import delta_errors, quantize
from gravity_hf.knowledge.residual_delta import ResidualDelta
from gravity_hf.knowledge.subspaces import angle_score, update_spans


def gaussian_delta(rank=2, width_in=192, width_out=128, seed=0, modules=2, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        {
            f"layers.{i}.map": (
                torch.randn(rank, width_in, generator=generator) * scale,
                torch.randn(width_out, rank, generator=generator),
            )
            for i in range(modules)
        }
    )


def dense_error(exact, used):
    return max(
        float((exact.update(n) - used.update(n)).norm() / exact.update(n).norm())
        for n in exact.factors
    )


@pytest.mark.parametrize("tier, bits", [(1, 6), (2, 5), (3, 4)])
def test_every_tier_is_met_with_the_smallest_width(tier, bits):
    delta = gaussian_delta()
    coded, report = quantize(delta, tier)
    assert report.passed and report.bits == bits
    assert report.rel_frobenius <= TIERS[tier].frobenius
    # With every smaller width, whatever the levels, it was measured to miss the ceiling.
    smaller = [error for width, _, error in report.tried if width < bits]
    assert len(smaller) == 2 * (bits - 2)
    assert min(smaller) > TIERS[tier].frobenius


def test_the_reported_error_is_the_real_one():
    delta = gaussian_delta()
    coded, report = quantize(delta, 3)
    used = coded.dequantize()
    assert report.rel_frobenius == pytest.approx(dense_error(delta, used), rel=1e-4)
    assert delta_errors(delta, used)[report.worst] == pytest.approx(report.rel_frobenius)
    difference = LowRankDelta.sum([delta, used.scaled(-1.0)])
    assert report.rel_frobenius_total == pytest.approx(difference.norm() / delta.norm(), rel=1e-4)


def test_the_sketch_knows_the_error():
    for seed in range(4):
        coded, report = quantize(gaussian_delta(seed=seed), 2, widths=(5,))
        assert coded.estimated_error() == pytest.approx(report.rel_frobenius, rel=0.45)


def test_how_a_delta_is_written_costs_nothing():
    """The same updates at any scale, and with factors that nearly cancel each other: rounding those
    as they are would lose everything."""
    plain = quantize(gaussian_delta(), 2, widths=(5,)).report
    mix = torch.tensor([[1.0, 1.0], [1.0, 1.01]])
    for scale in (1e6, 1e-6):
        delta = gaussian_delta(scale=scale)
        mixed = LowRankDelta(
            {name: (mix @ A, B @ mix.inverse()) for name, (A, B) in delta.factors.items()}
        )
        report = quantize(mixed, 2, widths=(5,)).report
        assert report.rel_frobenius == pytest.approx(plain.rel_frobenius, rel=0.15)


def test_directions_that_hardly_count_take_no_precision_from_the_others():
    delta = gaussian_delta(rank=3, modules=1)
    A, B = delta.factors["layers.0.map"]
    steep = LowRankDelta({"layers.0.map": (A, B * torch.tensor([1.0, 1e-2, 1e-4]))})
    assert quantize(steep, 2).report.bits <= quantize(delta, 2).report.bits


def test_refused_where_no_width_will_do():
    with pytest.raises(QuantizationError) as raised:
        quantize(gaussian_delta(), 1, widths=(2, 3, 4))
    text = str(raised.value)
    assert "2 bits" in text and "4 bits" in text and "above 0.05" in text
    with pytest.raises(QuantizationError, match="8 bits"):
        quantize(gaussian_delta(), Tier(9, frobenius=1e-3, routing_cosine=0.0, angle=0.0))


def test_routing_vector_is_coded_and_judged():
    vector = torch.randn(96, generator=torch.Generator().manual_seed(5))
    coded, report = quantize(gaussian_delta(), 1, embedding=vector)
    kept = coded.embedding()
    cosine = float(torch.nn.functional.cosine_similarity(vector, kept, dim=0))
    assert report.routing_cosine == pytest.approx(cosine, abs=1e-6)
    assert 0.99 < cosine < 1.0  # coded, not carried along
    strict = Tier(9, frobenius=0.5, routing_cosine=0.9999, angle=0.0)
    assert quantize(gaussian_delta(), strict, embedding=vector).report.bits >= 6
    with pytest.raises(QuantizationError, match="routing cosine"):
        quantize(gaussian_delta(), strict, embedding=vector, widths=(3, 4))


def test_distance_to_other_deltas_is_measured_on_the_coded_one():
    delta, far = gaussian_delta(), gaussian_delta(seed=1)
    coded, report = quantize(delta, 3, others=[far])
    scores = [
        angle_score(update_spans(*pair).input, update_spans(*far.factors[name]).input)
        for name, pair in coded.dequantize().factors.items()
    ]
    assert report.angle == pytest.approx(min(scores)) and report.angle > 0.5
    with pytest.raises(QuantizationError, match="angle to other deltas"):
        quantize(delta, 3, others=[far, delta])
    assert quantize(delta, 3).report.angle is None


def test_same_delta_same_codes_and_what_it_is_stays():
    first, again = (quantize(gaussian_delta(), 2, widths=(5,)).delta for _ in range(2))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    pair = (torch.randn(2, 64), torch.randn(64, 2))
    assert type(quantize(ResidualDelta({"model.layers.0": pair}), 3).delta.dequantize()) is (
        ResidualDelta
    )


def test_a_map_without_an_update_stays_without():
    pair = gaussian_delta(modules=1).factors["layers.0.map"]
    delta = LowRankDelta({"a": pair, "b": (torch.zeros_like(pair[0]), pair[1])})
    used = quantize(delta, 2).delta.dequantize()
    assert not used.update("b").any() and used.update("a").any()


def test_half_precision_is_coded_by_what_it_is():
    delta = gaussian_delta().to(dtype=torch.bfloat16)
    coded, report = quantize(delta, 2)
    assert dense_error(delta, coded.dequantize()) == pytest.approx(report.rel_frobenius, rel=1e-3)


def test_report_goes_into_json():
    report = quantize(gaussian_delta(), 3).report
    assert json.loads(json.dumps(report.to_dict()))["bits"] == 4


def test_what_is_not_finite_or_no_tier_is_refused():
    delta = gaussian_delta(modules=1)
    A, B = delta.factors["layers.0.map"]
    with pytest.raises(UnsafeFileError, match="finite"):
        quantize(LowRankDelta({"m": (A * float("nan"), B)}), 1)
    with pytest.raises(QuantizationError, match="expected one of 1, 2, 3"):
        tier_of(4)
    with pytest.raises(QuantizationError, match="another number"):
        tier_of(Tier(1, 0.5, 0.0, 0.0))
