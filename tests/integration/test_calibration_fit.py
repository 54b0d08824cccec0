"""Fitted calibration: least KL to the host's attention, and the most gravity within a budget."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from integration.spy import collect_heads

from gravity_hf import (
    GravityConfig,
    calibrate,
    load_gravity_model,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.integration import calibration, observers
from gravity_hf.integration.closed_form import HeadGeometry
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.integration.observers import Agreement
from gravity_hf.integration.trials import Trials

LAWS, DISTANCES = ("force", "power"), ("lifted", "euclidean")


def patched(family="qwen2", **settings):
    return patch_with_gravity(tiny_host(family), GravityConfig(**settings))


def padded_batch(family, seed=1):
    """Rows of 11 and 7 tokens: decoders padded on the left, encoders on the right."""
    inputs = tiny_inputs(family, seed=seed)
    hidden = slice(0, 4) if family == "qwen2" else slice(7, 11)
    inputs["attention_mask"][1, hidden] = 0
    return inputs


def kl_of_head(q, k, allowed, row, law, strength, softening):
    """float64, one head: mean over rows of KL(host || gravity)."""
    scaling = q.shape[-1] ** -0.5
    radius_sq = row["key_radius_sq"]
    kappa = k.square().sum(-1)[:, None] if radius_sq is None else radius_sq
    dot = q @ k.transpose(1, 2)
    softened = (q.square().sum(-1)[..., None] + kappa - 2 * dot).clamp(min=0) + softening
    score = strength / softened if law == "force" else -strength * softened.log()
    host, gravity = (x.masked_fill(~allowed, -1e30).log_softmax(-1) for x in (scaling * dot, score))
    return (host.exp() * (host - gravity)).sum(-1).mean().item()


def golden_section(function, low, high, steps=40):
    """The least value of a unimodal function."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return min(at_a, at_b)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_no_mass_and_softening_up_to_the_ceiling_is_closer(law, distance):
    """Against a fine grid of softenings with a golden-section search for each mass, in float64."""
    batches = [tiny_inputs("qwen2", seed=s) for s in (1, 2)]
    report = calibrate(patched(law=law), batches, distance=distance, fit=True)
    allowed = torch.ones(11, 11, dtype=torch.bool).tril()
    for layer, head in ((0, 1), (2, 4)):
        calls = collect_heads("qwen2", batches)[layer]
        q, k = (torch.cat([c[i][:, head] for c in calls]).double() for i in (0, 1))
        row = report.rows[6 * layer + head]
        scale = row["softening"] / row["softness"]
        assert 0 < row["softness"] <= 1

        def best(factor, q=q, k=k, row=row, scale=scale):
            softening = max(factor * scale, 0.1)
            typical = row["mean_distance"] + softening
            start = 2 * math.log(typical) if law == "force" else math.log(typical)
            return golden_section(
                lambda u: kl_of_head(q, k, allowed, row, law, math.exp(u), softening),
                start - 6,
                start + 3,
            )

        least = min(best(factor) for factor in [0.0, *torch.logspace(-2.5, 0, 24).tolist()])
        assert math.isclose(row["kl"], least, rel_tol=3e-3), (layer, head)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("family", ["qwen2", "bert"])
@pytest.mark.parametrize("softness", [0.0, 1.0])
def test_a_fit_beats_the_closed_form_on_every_head(law, distance, family, softness):
    batches = [padded_batch(family, seed) for seed in (1, 2)]
    options = {"softness": softness, "distance": distance}
    closed = calibrate(patched(family, law=law), batches, **options)
    fitted = calibrate(patched(family, law=law), batches, **options, fit=True)
    for before, after in zip(closed.rows, fitted.rows, strict=True):
        assert after["kl"] <= before["kl"] + 1e-7
        assert after["softness"] <= softness
    assert fitted.summary()["kl_mean"] < 0.97 * closed.summary()["kl_mean"]


def divergence(strength, unit, host, bias, visible):
    """float64, one head `[B, Tq, Tk]`: KL(host || softmax(strength * unit + bias)), all rows."""
    p, g = (x.masked_fill(~visible, -1e30).log_softmax(-1) for x in (host, strength * unit + bias))
    return (p.exp() * (p - g)).where(visible, 0.0).sum()


@pytest.mark.parametrize("law", LAWS)
def test_slope_and_curvature_are_the_derivatives_of_the_divergence(law):
    """With a bias for each head, hidden keys, a row without any, and only some heads wanted."""
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    bias = torch.randn(2, 4, 5, 7)
    bias[..., 2] = bias[1, :, 3] = torch.finfo(torch.float32).min
    center = torch.rand(4, dtype=torch.float64) * 9 + 9
    geometry = HeadGeometry(center, torch.ones_like(center), None, torch.ones_like(center), 0.4)
    softening, strength = torch.rand(2, 3, 4, dtype=torch.float64) + 0.5
    wanted = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    seen = Trials(geometry, law, softening, strength, wanted)
    seen.see(q, k, bias, 0.4)
    assert seen.rows == 9 and seen.sums[:, ~wanted].eq(0).all()
    keys, visible = k.repeat_interleave(2, 1).double(), bias > -1e30
    distance_sq = (q.double()[:, :, :, None] - keys[:, :, None]).square().sum(-1)
    host = 0.4 * q.double() @ keys.transpose(-2, -1) + bias
    for c, h in wanted.nonzero().tolist():
        typical, softened = center[h] + softening[c, h], distance_sq[:, h] + softening[c, h]
        unit = 0.2 * typical**2 / softened if law == "force" else -0.2 * typical * softened.log()
        data = (unit, host[:, h], bias[:, h].double(), visible[:, h])
        slope = torch.func.grad(divergence)
        curvature = torch.func.grad(slope)
        expected = [f(strength[c, h], *data) for f in (divergence, slope, curvature)]
        torch.testing.assert_close(seen.sums[:, c, h], torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity, count", [("kv_head", 2), ("layer", 1)])
@pytest.mark.parametrize("law", LAWS)
def test_heads_that_share_a_mass_share_the_best_one(law, granularity, count):
    inputs = tiny_inputs("qwen2")
    closed = calibrate(patched(law=law, mass_per=granularity), [inputs])
    model = patched(law=law, mass_per=granularity)
    fitted = calibrate(model, [inputs], fit=True)

    def by_group(rows, key):
        return torch.tensor([row[key] for row in rows]).view(3, count, -1)

    for key in ("mass", "softness"):
        values = by_group(fitted.rows, key)
        assert values.eq(values[..., :1]).all()
    assert len(set(by_group(fitted.rows, "softening").flatten().tolist())) > 3 * count
    least = by_group(fitted.rows, "kl").sum(-1)
    assert (least <= by_group(closed.rows, "kl").sum(-1) + 1e-7).all()
    for factor in (0.97, 1.03):
        for module in gravity_modules(model).values():
            terms = module()
            terms = terms._replace(mass=terms.mass * factor)
            module.observer = Agreement(terms, law, torch.ones(6))
        logits(model, inputs)
        moved = [module.observer.divergence() for module in gravity_modules(model).values()]
        assert (torch.stack(moved).view(3, count, -1).sum(-1) > least).all()
        for module in gravity_modules(model).values():
            module.observer = None


@pytest.mark.parametrize("law", LAWS)
def test_a_budget_takes_the_least_softness_that_keeps_it(law):
    batches = [padded_batch("qwen2", seed) for seed in (1, 2)]
    report = calibrate(patched(law=law), batches, max_kl=0.005)
    assert all(row["kl"] <= 0.005 and row["within_budget"] for row in report.rows)
    summary = report.summary()
    assert summary["over_budget"] == 0 and summary["max_kl"] == 0.005
    assert summary["softness"] == summary["softness_max"] == report.settings.softness
    assert summary["softness_min"] < summary["softness_median"] < summary["softness_max"]
    for index in (0, 7, 14):
        row = report.rows[index]
        softer = calibrate(patched(law=law), batches, softness=0.8 * row["softness"], fit=True)
        assert row["softness"] > 0 and softer.rows[index]["kl"] > 0.005


def test_a_larger_budget_is_more_gravity():
    batches = [tiny_inputs("qwen2", seed=s) for s in (1, 2)]
    reports = [calibrate(patched(), batches, max_kl=x) for x in (1e-4, 1e-3, 1e-2, 1.0)]
    for tight, loose in zip(reports[:-1], reports[1:], strict=True):
        for a, b in zip(tight.rows, loose.rows, strict=True):
            assert b["softness"] < a["softness"]
            assert b["contrast"] > a["contrast"]
    # All of it: the base epsilon is enough for every head, and no softening is learned.
    assert reports[-1].settings.softness == 0.0 and not reports[-1].settings.learn_softening
    assert all(math.isclose(row["softening"], 0.1, rel_tol=1e-6) for row in reports[-1].rows)


def test_a_budget_out_of_reach_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(calibration.logger, "warning", said.append)
    model = patched()
    report = calibrate(model, [tiny_inputs("qwen2")], max_kl=1e-6, max_softness=0.5)
    assert all(row["softness"] == 0.5 and not row["within_budget"] for row in report.rows)
    assert report.summary()["over_budget"] == 18 and model.config.gravity["softness"] == 0.5
    (message,) = said
    assert "18 of 18 heads" in message and "model.layers." in message and "1e-06" in message
    assert report.table().splitlines()[1].endswith("!")
    # With every head at the ceiling the masses are still the best ones there.
    fitted = calibrate(patched(), [tiny_inputs("qwen2")], softness=0.5, fit=True)
    assert report.summary()["kl_mean"] <= fitted.summary()["kl_mean"] * 1.01


@pytest.mark.parametrize("how", [{"fit": True}, {"max_kl": 0.01}])
def test_a_fit_is_deterministic_and_reads_generators(how):
    batches = [tiny_inputs("qwen2", seed=s) for s in (1, 2, 3)]
    assert calibrate(patched(), batches, **how) == calibrate(patched(), iter(batches), **how)


def test_small_blocks_find_the_same(monkeypatch):
    """Memory is bounded by blocks of rows; where they end must not matter."""
    batch = padded_batch("qwen2")
    whole = calibrate(patched(), [batch], fit=True)
    monkeypatch.setattr(observers, "_BLOCK_ELEMENTS", 300)
    parts = calibrate(patched(), [batch], fit=True)
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert math.isclose(a["mass"], b["mass"], rel_tol=1e-4)
        assert math.isclose(a["softness"], b["softness"], rel_tol=1e-4)


@pytest.mark.parametrize("how", [{"fit": True}, {"max_kl": 0.01}])
def test_a_failing_batch_changes_nothing(how):
    model, inputs = patched().train(), tiny_inputs("qwen2")
    settings, state = model.config.gravity, {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        calibrate(model, [inputs, {"input_ids": None}], **how)
    assert model.config.gravity == settings and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.observer is None for module in gravity_modules(model).values())


def test_a_budget_survives_saving(tmp_path):
    model, inputs = patched(law="power"), tiny_inputs("qwen2")
    report = calibrate(model, [inputs], max_kl=0.004)
    assert model.config.gravity["max_kl"] == 0.004
    model.save_pretrained(tmp_path)
    again = load_gravity_model(tmp_path)
    assert GravityConfig.from_dict(again.config.gravity) == report.settings
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    # Another calibration forgets the budget.
    assert calibrate(again, [inputs]).settings.max_kl is None


def test_unpatching_a_fitted_model_gives_the_host_bit_for_bit():
    host, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    model = patched()
    calibrate(model, [inputs], fit=True)
    assert not torch.equal(logits(model, inputs), logits(host, inputs))
    assert torch.equal(logits(unpatch_gravity(model), inputs), logits(host, inputs))


def test_a_token_that_sees_only_itself_is_fitted_to_the_closed_form():
    """No mass changes such an attention: the fit must end, and stay where it began."""
    inputs = tiny_inputs("qwen2", length=1)
    closed = calibrate(patched(), [inputs])
    fitted = calibrate(patched(), [inputs], softness=0.0, fit=True)
    assert all(row["kl"] < 1e-9 and math.isfinite(row["mass"]) for row in fitted.rows)
    assert all(row["kl"] < 1e-9 for row in closed.rows)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{"fit": True}, {"max_kl": 0.005}])
def test_a_gpu_finds_what_the_cpu_finds(how):
    batches = [padded_batch("qwen2", seed) for seed in (1, 2)]
    here = calibrate(patched(), batches, **how)
    there = calibrate(patched().cuda(), batches, **how)
    for a, b in zip(here.rows, there.rows, strict=True):
        assert math.isclose(a["mass"], b["mass"], rel_tol=1e-2)
        assert math.isclose(a["kl"], b["kl"], rel_tol=1e-2)
