"""`measure_attention`: what every head does at the model's current parameters, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from peft import LoraConfig, get_peft_model

from gravity_hf import GravityConfig, calibrate, gravity_lora, patch_with_gravity
from gravity_hf.integration import observers
from gravity_hf.integration.calibration import measure_attention
from gravity_hf.integration.hosts import gravity_modules

SAME = ("mass", "softening", "key_radius_sq")


def calibrated(family="qwen2", batches=None, **options):
    settings = {k: options.pop(k) for k in ("law", "mass_per") if k in options}
    model = patch_with_gravity(tiny_host(family), GravityConfig(**settings))
    return model, calibrate(model, batches or [tiny_inputs(family)], **options)


@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("distance", ["lifted", "euclidean"])
def test_it_agrees_with_calibration_where_both_see_the_same_queries(law, distance):
    """Queries and keys of the first module do not depend on any attention."""
    batches = [tiny_inputs("qwen2", seed=s) for s in (1, 2)]
    model, report = calibrated(batches=batches, law=law, distance=distance)
    measured = measure_attention(model, iter(batches))
    assert measured.settings == report.settings
    for before, after in zip(report.rows[:6], measured.rows[:6], strict=True):
        for key in (*SAME, "softness", "mean_distance", "contrast", "kl"):
            if before[key] is not None:
                assert math.isclose(before[key], after[key], rel_tol=1e-3), key
    for before, after in zip(report.rows[6:], measured.rows[6:], strict=True):
        assert all(
            before[k] is None or math.isclose(before[k], after[k], rel_tol=1e-5) for k in SAME
        )
        assert before["kl"] != after["kl"]


def test_gravity_s_own_outputs_flow_on():
    """Not the host's: deep heads are measured where they now work."""
    model, _ = calibrated(softness=0.0)
    inputs, seen = tiny_inputs("qwen2"), []
    attention = model.model.layers[2].self_attn
    attention.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = logits(model, inputs)
    measure_attention(model, [inputs])
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert torch.equal(logits(model, inputs), expected)


def test_it_changes_nothing():
    model, _ = calibrated(softness=0.25)
    model.train()
    model.model.layers[0].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    measure_attention(model, [tiny_inputs("qwen2")])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and not model.model.layers[0].training
    assert all(module.observer is None for module in gravity_modules(model).values())


def test_under_lora_the_trained_masses_count():
    model, _ = calibrated(softness=0.25)
    wrapped = gravity_lora(model, r=2)
    inputs = tiny_inputs("qwen2")
    before = measure_attention(wrapped, [inputs])
    with torch.no_grad():
        for module in gravity_modules(wrapped).values():
            module.mass_log.mul_(1.5)
    after = measure_attention(wrapped, [inputs])
    for a, b in zip(before.rows, after.rows, strict=True):
        assert b["mass"] > 1.4 * a["mass"] and b["softening"] == a["softening"]
        assert b["kl"] > 2 * a["kl"]
    with wrapped.disable_adapter():
        assert measure_attention(wrapped, [inputs]) == before


def test_padding_and_masks_of_encoders_are_kept():
    model, _ = calibrated("bert", softness=0.5)
    inputs = tiny_inputs("bert", batch=1)
    padding = torch.zeros(1, 5, dtype=torch.long)
    padded = {key: torch.cat([value, padding], 1) for key, value in inputs.items()}
    plain, with_padding = (measure_attention(model, [batch]) for batch in (inputs, padded))
    for a, b in zip(plain.rows, with_padding.rows, strict=True):
        assert math.isclose(a["kl"], b["kl"], rel_tol=1e-2, abs_tol=1e-6)
        assert math.isclose(a["contrast"], b["contrast"], rel_tol=1e-3)


def test_gravity_2_s_constants_can_be_measured():
    model = patch_with_gravity(tiny_host("qwen2"))
    report = measure_attention(model, [tiny_inputs("qwen2")])
    assert all(math.isclose(row["softening"], 0.1, rel_tol=1e-6) for row in report.rows)
    assert report.summary()["softness"] is None and report.summary()["kl_mean"] > 0.01


def test_keys_beyond_the_sphere_stay_within_the_histogram():
    """Later keys may be longer than calibration's: their distances must not pile up in one bin."""
    model, _ = calibrated(softness=0.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(3.0)
    bins = []
    original = observers.Agreement.contrast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            observers.Agreement,
            "contrast",
            lambda self: bins.append(self.histogram[:, -1].sum().item()) or original(self),
        )
        report = measure_attention(model, [tiny_inputs("qwen2")])
    assert bins == [0.0, 0.0, 0.0]
    assert all(math.isfinite(row["contrast"]) for row in report.rows)


def test_autocast_does_not_round_the_distances():
    """Trainer runs a bf16 model under autocast; bf16 products would drown a small KL."""
    model, _ = calibrated("bert", softness=4.0)
    inputs = tiny_inputs("bert")
    exact = measure_attention(model, [inputs])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = measure_attention(model, [inputs])
    for a, b in zip(exact.rows, rounded.rows, strict=True):
        assert math.isclose(a["kl"], b["kl"], rel_tol=0.2)


def test_a_model_without_gravity_is_refused():
    with pytest.raises(RuntimeError, match="patch_with_gravity"):
        measure_attention(tiny_host("qwen2"), [tiny_inputs("qwen2")])
    plain = get_peft_model(tiny_host("qwen2"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="measure_attention"):
        measure_attention(plain, [tiny_inputs("qwen2")])


def test_no_batches_are_refused():
    model, _ = calibrated()
    with pytest.raises(ValueError, match="measure_attention: expected at least one batch"):
        measure_attention(model, [])
