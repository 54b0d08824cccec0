"""The sweep can fail: what it must see, it sees."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hosts import tiny_host
from integration.sweep import checks, nearness
from integration.sweep.configs import tiny_model
from integration.sweep.examine import examine_model
from integration.sweep.inputs import tiny_inputs_of
from integration.sweep.outcomes import (
    collapsed,
    regressions,
    regressions_elsewhere,
    silent_failures,
)
from integration.sweep.parts import named_types, part_of
from integration.sweep.probe import in_budgets, probing
from integration.sweep.processes import examine_all
from integration.sweep.sight import whole_model
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from gravity_hf import patch_with_gravity
from gravity_hf.integration import attention
from gravity_hf.integration.guards import unwatch
from gravity_hf.integration.masks import gravity_mask
from gravity_hf.integration.support_table import PROMISES, SupportRecord


def bert():
    return tiny_host("bert", num_hidden_layers=1)


@pytest.fixture(scope="module")
def record() -> SupportRecord:
    return examine_model("bert", bert())


def test_a_sound_host_passes(record):
    assert (record.status, record.reason, record.broken) == ("passes", "", {})
    assert set(record.promises) == set(PROMISES)
    assert record.promises["cached"].startswith("not applicable")
    assert record.reached == ("bert.encoder.layer.*.attention.self",)
    assert record.cosine > 0.99


def altered(monkeypatch, change):
    """`gravity_attention` with its output changed on the way out."""
    true = attention.gravity_attention
    monkeypatch.setattr(attention, "gravity_attention", lambda *a, **k: change(true(*a, **k)))


def test_wrong_numbers_are_seen(monkeypatch):
    altered(monkeypatch, lambda output: output * 1.001)
    record = examine_model("bert", bert())
    assert record.status == "partly"
    assert "error budget" in record.promises["correct"]
    assert "error budget" in record.promises["backward"]
    assert silent_failures(record)


def test_a_lost_gradient_is_seen(monkeypatch):
    altered(monkeypatch, lambda output: output.detach())
    record = examine_model("bert", bert())
    assert record.promises["correct"] == "passed"
    assert "has no gradient" in record.promises["backward"]


def test_a_wrong_step_of_generation_is_seen(monkeypatch):
    model = tiny_host("qwen2", num_hidden_layers=1)
    inputs = tiny_inputs_of(model, 1)
    patch_with_gravity(model)
    assert checks.check_cached(model, inputs).passed
    altered(monkeypatch, lambda output: -9.0 * output if output.shape[2] == 1 else output)
    assert checks.check_cached(model, inputs).kind == "wrong"


def test_a_lost_tensor_is_seen():
    model, again = bert(), bert()
    inputs = tiny_inputs_of(model, 1)
    assert checks.check_same_model(model, again, inputs).passed
    with torch.no_grad():
        next(again.parameters()).view(-1)[-1] += 1e-6
    assert "differs" in checks.check_same_model(model, again, inputs).reason


def test_a_silent_dot_product_is_seen():
    """Modules that bypass the registered function are not reached, and that is no pass."""
    model = bert()
    inputs = tiny_inputs_of(model, 1)
    patch_with_gravity(model)
    for module in model.modules():
        unwatch(module)  # who is called under another name refuses, and bypasses nothing
    model.config._attn_implementation_internal = "sdpa"
    with probing(model) as probes:
        whole_model(model, inputs)
    assert checks.check_reached(probes).kind == "wrong"


def test_a_lost_mask_is_seen(monkeypatch):
    """Gravity without the host's mask agrees with itself at every softness, never with the host."""
    model = tiny_host("qwen2", num_hidden_layers=1)
    inputs = tiny_inputs_of(model, 1)
    host = checks.HostState.of(model, inputs)
    true = attention.gravity_attention
    blind = {"mask": None, "causal": False, "window": None, "key_ranges": None}
    monkeypatch.setattr(attention, "gravity_attention", lambda *a, **k: true(*a, **(k | blind)))
    calibration = nearness.Calibration(
        model, inputs, host.visible_output, ["model.layers.0.self_attn"]
    )
    assert calibration.check_converges().kind == "wrong"


_LOST = {
    "padding": {"attention_mask": None},
    "windows": {"mask_function": causal_mask_function},
}


@pytest.mark.parametrize("lost", _LOST)
@pytest.mark.parametrize("model_type", ["mistral", "gpt_oss", "gemma2"])
def test_what_the_mask_function_loses_is_never_excused(monkeypatch, model_type, lost):
    """On a host with windows, one without SDPA but with sinks, and one with capped scores."""
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping,
        "gravity",
        lambda **given: gravity_mask(**{**given, **_LOST[lost]}),
    )
    record = examine_model(model_type, tiny_model(model_type, 0))
    assert record.promises["correct"] == "passed", "gravity itself is right on what it is given"
    assert {"host", "converges"} <= set(record.broken)
    assert record.status == "partly" and silent_failures(record)


def test_a_small_loss_is_seen_by_the_host_s_own_attention(monkeypatch):
    """Far less than gravity's own distance at softness 16, where `converges` cannot see it."""
    model = tiny_host("qwen2", num_hidden_layers=1)
    inputs = tiny_inputs_of(model, 1)
    host = checks.HostState.of(model, inputs)
    patch_with_gravity(model)
    assert nearness.check_host(model, inputs, host).passed
    true = attention.dot_product_attention
    monkeypatch.setattr(attention, "dot_product_attention", lambda *a: (1.001 * true(*a)[0], None))
    assert nearness.check_host(model, inputs, host).kind == "wrong"


def test_a_host_that_is_not_given_back_is_seen():
    model = bert()
    inputs = tiny_inputs_of(model, 1)
    host = checks.HostState.of(model, inputs)
    assert checks.check_unpatched(model, inputs, host).passed
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert checks.check_unpatched(model, inputs, host).kind == "wrong"
    patch_with_gravity(model)
    assert "class" in checks.check_unpatched(model, inputs, host).reason


def test_an_error_beyond_the_rounding_is_over_budget():
    exact = torch.linspace(1.0, 2.0, 9, dtype=torch.float64)
    assert in_budgets(exact.float(), exact, exact.float()) <= 1.0
    assert in_budgets(exact.float() + 1e-5, exact, exact.float()) > 1.0
    assert in_budgets(exact.float() * float("nan"), exact, exact.float()) == float("inf")


def test_a_regression_is_a_promise_that_was_kept(record):
    assert regressions(record, record) == []
    outcomes = {**record.promises, "cached": "passed"}
    before = dataclasses.replace(record, promises=outcomes)
    assert regressions(record, before) == [f"cached: {record.promises['cached']}"]
    gone = SupportRecord("bert", "text encoder", status="not built", reason="no library")
    assert len(regressions(gone, record)) == len(record.kept)
    assert regressions(record, gone) == []


def test_another_transformers_does_not_excuse_that_gravity_does_not_run(record):
    refused = SupportRecord("bert", "text encoder", status="refused", reason="by name")
    broken = {**record.promises, "reached": "raised: TypeError: x", "correct": "wrong: 2"}
    broken = dataclasses.replace(record, status="partly", promises=broken)
    assert regressions_elsewhere(record, record) == []
    assert regressions_elsewhere(refused, record) == [
        f"{name}: not tried, refused: by name" for name in ("patched", "reached", "correct")
    ]
    assert regressions_elsewhere(broken, record) == [
        "correct: wrong: 2",
        "reached: raised: TypeError: x",
    ]
    assert regressions_elsewhere(refused, refused) == []
    assert regressions_elsewhere(broken, refused) == ["correct: wrong: 2"]


def test_only_wrong_numbers_are_silent_failures(record):
    def with_outcome(name, outcome):
        return dataclasses.replace(record, promises={**record.promises, name: outcome})

    assert silent_failures(record) == []
    assert silent_failures(with_outcome("cached", "raised: ValueError: no")) == []
    assert silent_failures(with_outcome("calibrated", "wrong: the lowest cosine is 0.9")) == []
    assert silent_failures(with_outcome("host", "wrong: 1")) == ["host: wrong: 1"]


def test_module_names_are_collapsed():
    names = ["h.0.attn", "h.1.attn", "h.1.layer1.5", "norm2.x"]
    assert collapsed(names) == ("h.*.attn", "h.*.layer1.*", "norm2.x")


def test_the_default_part_is_a_third_and_the_named_families():
    """The parts are fixed: a change here changes what runs before every merge."""
    assert [part_of(name) for name in ("bert", "llama", "whisper")] == [2, 2, 1]
    assert {"qwen2", "bert", "vit", "bart", "swin", "deepseek_v3"} <= named_types()


def test_an_examination_that_takes_too_long_is_named():
    (record,) = examine_all(["bert"], jobs=1, limit_s=0.0)
    assert (record.status, record.reason) == ("no result", "no result within 0 s")
    assert record.category == "text encoder"


def test_examinations_in_processes_say_the_same():
    (record,) = examine_all(["bert"], jobs=2, limit_s=120.0)
    assert record.status == "passes" and record.model == "BertForMaskedLM"
