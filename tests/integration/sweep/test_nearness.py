"""What is said of hosts that are hard to come near, and how they are told from a weak gravity."""

from __future__ import annotations

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from integration.sweep import checks, nearness
from integration.sweep.examine import examine_model
from integration.sweep.inputs import tiny_inputs_of
from integration.sweep.outcomes import Outcome
from integration.sweep.probe import in_budgets, probing
from integration.sweep.sensitivity import sensitivity_of
from integration.sweep.sight import AttentionOutputs, shows_attention, whole_model

from gravity_hf import calibrate, patch_with_gravity, unpatch_gravity
from gravity_hf.integration import attention

ATTENTION = "bert.encoder.layer.0.attention.self"


def bert():
    return tiny_host("bert", num_hidden_layers=1)


def blind_bert():
    """Its output is the same whatever its attention does."""
    model = bert()
    with torch.no_grad():
        model.cls.predictions.transform.dense.weight.zero_()
    return model


def chaotic_bert():
    """Its output is another for the smallest change of its attention."""
    model = bert()
    model.cls.register_forward_hook(lambda module, given, output: (3e3 * output).sin())
    return model


def calibration_of(model):
    inputs = tiny_inputs_of(model, 1)
    host = checks.HostState.of(model, inputs)
    return nearness.Calibration(model, inputs, host.visible_output, [ATTENTION])


def test_rows_are_told_from_the_whole():
    exact = torch.eye(4)
    actual = exact.clone()
    actual[3] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    found = nearness.Nearness.of(actual, exact)
    assert (found.lowest, found.near_rows) == (0.0, 0.75)
    assert found.whole == pytest.approx(0.75)
    assert nearness.Nearness.of(exact, exact) == pytest.approx((1.0, 1.0, 1.0))
    padded = torch.cat([exact, torch.zeros(4, 4)])
    assert nearness.Nearness.of(padded, padded).near_rows == 1.0
    with pytest.raises(ValueError, match=r"expected an output \[4, 4\]"):
        nearness.Nearness.of(exact[:3], exact)


def test_a_host_that_amplifies_everything_is_told_from_a_weak_gravity(monkeypatch):
    outcome = calibration_of(chaotic_bert()).check_calibrated()
    assert outcome.kind == "not applicable" and "its own softmax temperature" in outcome.reason

    monkeypatch.setattr(nearness, "SOFTNESS", 0.0)
    weak = calibration_of(chaotic_bert()).check_calibrated()
    assert weak.kind == "wrong" and "the attention outputs are within" in weak.reason


def test_an_output_that_is_elsewhere_by_dot_product_too_is_no_sensitivity():
    """What the way to attention loses moves the control as well: it excuses nothing."""
    calibration = calibration_of(bert())
    calibration.host = -calibration.host
    calibration.nearness = nearness.Nearness.of(calibration.output, calibration.host)
    assert calibration.check_calibrated().kind == "wrong"


def test_a_weak_gravity_on_a_steady_host_is_wrong(monkeypatch):
    true = attention.gravity_attention
    monkeypatch.setattr(attention, "gravity_attention", lambda *a, **k: -true(*a, **k))
    assert calibration_of(bert()).check_calibrated().kind == "wrong"


def test_a_fit_counts_and_is_noted(monkeypatch):
    calibration = calibration_of(bert())
    assert calibration.check_calibrated().passed and calibration.note == ""
    calibration.nearness = calibration.nearness._replace(whole=0.98)
    assert calibration.check_calibrated().passed
    assert "by calibrate(fit=True), 0.9800 by the closed form" in calibration.note


def test_the_control_moves_the_attention_as_far_as_gravity_does():
    model, inputs = bert(), tiny_inputs("bert")
    sight = AttentionOutputs([ATTENTION])
    host = sight(model, inputs, True)
    patch_with_gravity(model)
    calibrate(model, [inputs], softness=4.0, progress=False)
    gravity = nearness.relative_distance(sight(model, inputs, True), host)
    found = sensitivity_of(model, inputs, sight)
    # Both are errors of one size, and cosines see the part of them that is across.
    assert gravity > 1e-3
    assert 1 - gravity**2 < found.moved < 1.0
    assert 1 - gravity**2 < found.local < 1.0
    assert all(module.gravity.observer is None for module in [model.get_submodule(ATTENTION)])


def test_a_model_whose_output_hides_attention_is_looked_at_inside():
    record = examine_model("bert", blind_bert())
    assert (record.status, record.reason) == ("passes", "")
    (note,) = record.notes
    assert note.startswith("compared at the outputs of the attention modules")
    assert record.promises["differs"] == "passed" and 0.99 < record.whole_cosine < 1.0


def test_a_silent_dot_product_is_not_excused_by_the_output(monkeypatch):
    """Where the output does show attention it must differ."""
    model, inputs = bert(), tiny_inputs("bert")
    host = whole_model(model, inputs)
    patch_with_gravity(model)
    assert shows_attention(model, inputs, host)
    with probing(model) as probes:
        whole_model(model, inputs)
    assert checks.check_differs(host, host, probes).kind == "wrong"
    blind = blind_bert()
    host = whole_model(blind, inputs)
    assert not shows_attention(patch_with_gravity(blind), inputs, host)


def test_a_decision_by_a_hair_is_not_the_cache_s_fault():
    """What differs in float32 only is rounding; what differs in float64, too, is wrong."""
    model = tiny_host("qwen2", num_hidden_layers=1)
    inputs = tiny_inputs_of(model, 1)
    patch_with_gravity(model)
    dtypes = [torch.float32]

    def turn(module, given, output):
        cached = model.get_submodule("model").last_length == 1
        return -output if cached and output.dtype in dtypes else output

    model.model.last_length = 0
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(
            model.model, "last_length", kwargs["input_ids"].shape[1]
        ),
        with_kwargs=True,
    )
    model.lm_head.register_forward_hook(turn)
    assert checks._check_tokens(model, inputs).kind == "wrong"
    assert checks.check_cached(model, inputs).passed
    dtypes.append(torch.float64)
    assert checks.check_cached(model, inputs).kind == "wrong"


def test_an_endless_gradient_of_the_host_is_not_gravity_s():
    model = bert()
    model.bert.embeddings.register_forward_hook(
        lambda module, given, output: output + (output - output).sum().pow(0.5)
    )
    record = examine_model("bert", model)
    assert record.promises["backward"].startswith("not applicable: the host's own fails, too")
    # A mass that is wrong is not excused by it.
    assert not checks.is_endless(Outcome("wrong", "the gradient of the mass of x: 2 times"))


def test_what_rounded_inputs_leave_open_is_in_the_budget():
    exact = torch.zeros(3, dtype=torch.float64)
    actual = torch.full((3,), 1e-3)
    assert in_budgets(actual, exact, exact.float()) > 1.0
    assert in_budgets(actual, exact, exact.float(), exact + 1e-3) <= 1.0


def test_neighbours_of_a_gradient_are_near_it():
    model, inputs = bert(), tiny_inputs_of(bert(), 1)
    patch_with_gravity(model)
    with torch.enable_grad(), probing(model) as probes:
        whole = checks.gradient_target(checks.run(model, inputs))
        whole.backward()
    (probe,) = probes.values()
    exact, one, other = (probe.mass_gradient(torch.float64, seed) for seed in (None, 0, 1))
    assert not torch.equal(one, other)
    assert nearness.relative_distance(one, exact) < 1e-4
    unpatch_gravity(model)
