"""Calibration: closed forms checked against plain arithmetic, streaming, determinism."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from integration.spy import collect_heads
from torch.nn import functional as F

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.integration.observers import Agreement, Moments, Observer


@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("distance", ["lifted", "euclidean"])
def test_closed_forms_match_plain_arithmetic(law, distance):
    batches = [tiny_inputs("qwen2", seed=s) for s in (1, 2)]
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(law=law))
    report = calibrate(model, batches, softness=0.5, distance=distance)
    rows = iter(report.rows)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    for calls in collect_heads("qwen2", batches):
        q = torch.cat([call[0] for call in calls]).double()
        k = torch.cat([call[1] for call in calls]).double()
        for head in range(6):
            qh, kh = q[:, head], k[:, head]
            keys = (k[:, 3 * (head // 3)]).square().sum(-1)
            radius_sq = keys.max()
            kappa = radius_sq if distance == "lifted" else kh.square().sum(-1)[:, None]
            d2 = qh.square().sum(-1)[..., None] + kappa - 2 * qh @ kh.transpose(1, 2)
            hidden = ~causal
            scaling = q.shape[-1] ** -0.5
            p = (scaling * qh @ kh.transpose(1, 2)).masked_fill(hidden, -1e30).log_softmax(-1)
            mean_distance = (p.exp() * d2).sum(-1).mean()
            key_scale = radius_sq if distance == "lifted" else keys.mean()
            eps = 0.5 * (qh.square().sum(-1).mean() + key_scale)
            typical = mean_distance + eps
            mass = (
                typical * math.sqrt(scaling / 2)
                if law == "force"
                else (typical * scaling / 2).sqrt()
            )
            # Quantiles of a finite sample lie between its neighbouring order statistics.
            step = 1.0 / d2[:, causal].numel()
            fractions = torch.tensor([0.05 - step, 0.05 + step, 0.95 - step, 0.95 + step])
            near_low, near_high, far_low, far_high = torch.quantile(
                d2[:, causal], fractions.double()
            )
            score = mass**2 / (d2 + eps) if law == "force" else -(mass**2) * (d2 + eps).log()
            g = score.masked_fill(hidden, -1e30).log_softmax(-1)
            kl = (p.exp() * (p - g)).sum(-1).mean()
            row = next(rows)
            assert row["head"] == head
            close = {"rel_tol": 1e-4}
            assert math.isclose(row["mean_distance"], mean_distance, **close)
            assert math.isclose(row["softening"], eps, **close)
            assert math.isclose(row["mass"], mass, **close)
            assert math.isclose(row["kl"], kl, rel_tol=1e-2, abs_tol=1e-6)
            least = ((far_low + eps) / (near_high + eps)) ** 2
            most = ((far_high + eps) / (near_low + eps)) ** 2
            assert 0.999 * least <= row["contrast"] <= 1.001 * most
            if distance == "lifted":
                assert math.isclose(row["key_radius_sq"], radius_sq, **close)
            else:
                assert row["key_radius_sq"] is None
    assert next(rows, None) is None


def test_what_is_installed_is_what_is_reported():
    model = patch_with_gravity(tiny_host("qwen2"))
    report = calibrate(model, [tiny_inputs("qwen2")])
    for name, module in gravity_modules(model).items():
        terms = module()
        rows = [row for row in report.rows if row["layer"] == name]
        for head, row in enumerate(rows):
            assert math.isclose(terms.mass[head].item(), row["mass"], rel_tol=1e-5)
            assert math.isclose(terms.softening[head].item(), row["softening"], rel_tol=1e-5)
            assert terms.key_radius_sq[head // 3].item() == row["key_radius_sq"]


def test_softness_brings_the_model_to_its_host():
    inputs = tiny_inputs("qwen2")
    host = logits(tiny_host("qwen2"), inputs)
    errors, divergences, contrasts = [], [], []
    for softness in (0.0, 1.0, 16.0, 256.0):
        model = patch_with_gravity(tiny_host("qwen2"))
        summary = calibrate(model, [inputs], softness=softness).summary()
        errors.append((logits(model, inputs) - host).abs().max().item())
        divergences.append(summary["kl_mean"])
        contrasts.append(summary["contrast_median"])
    for values in (errors, divergences, contrasts):
        assert values == sorted(values, reverse=True) and values[0] > 2 * values[-1]
    assert contrasts[-1] > 1.0


def test_the_mass_is_where_the_divergence_is_smallest():
    """The closed form against other masses: a tangent elsewhere fits the host's attention worse."""
    model, inputs = patch_with_gravity(tiny_host("qwen2")), tiny_inputs("qwen2")
    best = calibrate(model, [inputs])
    heads = {}
    for factor in (0.8, 1.0, 1.25):
        for module in gravity_modules(model).values():
            terms = module()
            terms = terms._replace(mass=terms.mass * factor)
            module.observer = Agreement(terms, "force", torch.ones(6))
        logits(model, inputs)
        for module in gravity_modules(model).values():
            heads.setdefault(factor, []).append(module.observer.divergence())
            module.observer = None
    mean = {factor: torch.cat(values).mean().item() for factor, values in heads.items()}
    assert math.isclose(mean[1.0], best.summary()["kl_mean"], rel_tol=1e-3)
    assert mean[1.0] < 0.5 * mean[0.8] and mean[1.0] < 0.5 * mean[1.25]


def test_padding_teaches_nothing():
    inputs = tiny_inputs("qwen2", batch=1)
    padding = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.cat([padding, inputs["attention_mask"]], 1)
    padded = {
        "input_ids": torch.cat([padding, inputs["input_ids"]], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    plain = calibrate(patch_with_gravity(tiny_host("qwen2")), [inputs])
    with_padding = calibrate(patch_with_gravity(tiny_host("qwen2")), [padded])
    for a, b in zip(plain.rows, with_padding.rows, strict=True):
        for key in ("mean_distance", "mass", "softening", "key_radius_sq", "contrast"):
            assert math.isclose(a[key], b[key], rel_tol=1e-4), key


def test_right_padding_of_an_encoder_teaches_nothing():
    inputs = tiny_inputs("bert", batch=1)
    padding = torch.zeros(1, 5, dtype=torch.long)
    padded = {key: torch.cat([value, padding], 1) for key, value in inputs.items()}
    plain = calibrate(patch_with_gravity(tiny_host("bert")), [inputs])
    with_padding = calibrate(patch_with_gravity(tiny_host("bert")), [padded])
    for a, b in zip(plain.rows, with_padding.rows, strict=True):
        assert math.isclose(a["mass"], b["mass"], rel_tol=1e-4)


def test_a_bias_in_the_host_s_mask_counts_as_the_host_s_attention():
    """Swin and its kin fold their relative positions into a float mask, one for each head."""
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    bias = torch.randn(1, 4, 5, 7)
    bias[..., 2] = torch.finfo(torch.float32).min
    seen = Moments()
    seen.see(q, k, bias, 0.5)
    dot = q @ k.repeat_interleave(2, 1).transpose(-2, -1)
    expected = ((0.5 * dot + bias).softmax(-1) * dot).sum((0, 2, 3))
    torch.testing.assert_close(seen.sums["dot"].float(), expected)
    assert seen.keys == 2 * 6 and seen.queries == 2 * 5


def test_it_is_deterministic_and_reads_generators():
    batches = [tiny_inputs("qwen2", seed=s) for s in (1, 2, 3)]
    first = calibrate(patch_with_gravity(tiny_host("qwen2")), batches)
    second = calibrate(patch_with_gravity(tiny_host("qwen2")), (b for b in batches))
    assert first == second


def test_two_small_batches_equal_one_large():
    both = tiny_inputs("qwen2", batch=4)
    halves = [{k: v[i : i + 2] for k, v in both.items()} for i in (0, 2)]
    whole = calibrate(patch_with_gravity(tiny_host("qwen2")), [both])
    split = calibrate(patch_with_gravity(tiny_host("qwen2")), halves)
    for a, b in zip(whole.rows, split.rows, strict=True):
        for key in ("mean_distance", "mass", "softening", "key_radius_sq", "contrast"):
            assert math.isclose(a[key], b[key], rel_tol=1e-5), key


def test_closed_form_only_keeps_the_published_softening():
    model = patch_with_gravity(tiny_host("qwen2"))
    calibrate(model, [tiny_inputs("qwen2")], softness=0.0, distance="euclidean")
    module = next(iter(gravity_modules(model).values()))
    assert not hasattr(module, "softening_log") and not hasattr(module, "key_radius_sq")
    assert module().softening.eq(torch.tensor(0.1)).all()


@pytest.mark.parametrize("granularity, count", [("kv_head", 2), ("layer", 1)])
def test_shared_masses_are_the_mean_of_their_heads(granularity, count):
    inputs = tiny_inputs("qwen2")
    single = calibrate(patch_with_gravity(tiny_host("qwen2")), [inputs])
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(mass_per=granularity))
    calibrate(model, [inputs])
    masses = torch.tensor([row["mass"] for row in single.rows]).view(3, count, -1).mean(-1)
    for expected, module in zip(masses, gravity_modules(model).values(), strict=True):
        torch.testing.assert_close(F.softplus(module.mass_log), expected)


def test_training_mode_and_the_model_s_own_attention_are_restored():
    model = patch_with_gravity(tiny_host("qwen2")).train()
    model.model.layers[0].eval()
    calibrate(model, [tiny_inputs("qwen2")])
    assert model.training and not model.model.layers[0].training
    assert all(module.observer is None for module in gravity_modules(model).values())


def test_a_failing_batch_changes_nothing():
    model, inputs = patch_with_gravity(tiny_host("qwen2")), tiny_inputs("qwen2")
    before, settings = logits(model, inputs), model.config.gravity
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        calibrate(model, [inputs, {"no_such_input": 1, "input_ids": None}])
    assert torch.equal(logits(model, inputs), before) and model.config.gravity == settings


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"softness": -1.0}, ValueError, "softness: expected a finite number >= 0"),
        ({"softness": math.nan}, ValueError, "softness"),
        ({"max_kl": 0.0}, ValueError, "max_kl: expected a finite number > 0"),
        ({"max_kl": math.inf}, ValueError, "max_kl"),
        ({"max_kl": 0.1, "max_softness": 0.0}, ValueError, "max_softness: expected a finite"),
        ({"max_kl": 0.1, "softness": 1.0}, ValueError, "softness or max_kl"),
        ({"distance": "manhattan"}, ValueError, "distance: expected one of"),
        ({"batches": []}, ValueError, "at least one batch"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    model = patch_with_gravity(tiny_host("qwen2"))
    with pytest.raises(error, match=message):
        calibrate(model, **{"batches": [tiny_inputs("qwen2")], **arguments})


def test_an_unpatched_model_is_refused():
    with pytest.raises(RuntimeError, match="patch_with_gravity"):
        calibrate(tiny_host("qwen2"), [tiny_inputs("qwen2")])


def test_overflowing_statistics_are_refused_by_module_name():
    model = patch_with_gravity(tiny_host("qwen2"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn.*finite"):
        calibrate(model, [tiny_inputs("qwen2")])


def test_the_report_reads_as_rows_table_and_json():
    report = calibrate(patch_with_gravity(tiny_host("qwen2")), [tiny_inputs("qwen2")])
    assert len(report.rows) == 18
    table = report.table().splitlines()
    assert len(table) == 19 and "contrast" in table[0] and "model.layers.2.self_attn" in table[-1]
    content = json.loads(report.to_json())
    assert content["rows"] == list(report.rows)
    assert content["summary"]["softness"] == 1.0 == content["summary"]["softness_min"]
    assert "softness" in table[0] and content["settings"]["distance"] == "lifted"


def test_the_observer_sees_the_host_s_own_attention():
    """While it runs, calibration must feed later layers what the host would have fed them."""
    model, inputs = patch_with_gravity(tiny_host("qwen2")), tiny_inputs("qwen2")
    host = logits(tiny_host("qwen2"), inputs)

    class Nothing(Observer):
        def update(self, view, scaling):
            pass

    for module in gravity_modules(model).values():
        module.observer = Nothing()
    torch.testing.assert_close(logits(model, inputs), host, rtol=1e-4, atol=1e-5)
