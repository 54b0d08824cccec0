"""The mirror's numbers are those of the forward that ran, and watching leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from runtime.watched import LENGTH, causal, entropy_of, lgt_forces, tiny_lgt, tiny_tri, token_ids
from torch import Tensor

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.integration.attention import AttentionCall
from gravity_hf.runtime import Ledger, MirrorLayer, MirrorReport
from gravity_hf.runtime.watching import observed_modules

GOLDEN = Path(__file__).parents[1] / "golden" / "lgt" / "mirror.json"
CLOSE = {"rel": 2e-5, "abs": 1e-6}


def reported(model: Any, *args: Any, rows: int | None = None, **inputs: Any) -> MirrorReport:
    mirror = MirrorLayer(rows=rows)
    with torch.no_grad(), mirror.watch(model):
        model(*args, **inputs)
    return mirror.report()


def values(report: MirrorReport, layer: int, name: str) -> list[float]:
    return [getattr(head, name) for head in report.layers[layer].heads]


def means(x: Tensor, keep: Tensor) -> list[float]:
    """Of `x` `[B, H, T, T]` over the pairs in `keep`, by head."""
    return [head[keep.expand_as(head)].mean().item() for head in x.unbind(1)]


@pytest.mark.parametrize("cap", ["clamp", "tanh", None])
def test_forces_of_an_lgt_are_the_true_ones(cap: str | None) -> None:
    limit = None if cap is None else 2.0
    model = tiny_lgt(max_force=limit, **({} if cap is None else {"force_cap": cap}))
    report = reported(model, token_ids())
    keep = causal(LENGTH)
    for layer, (force, mass) in enumerate(lgt_forces(model, token_ids())):
        applied = force
        if limit is not None:
            saturated = (force >= limit).double()
            assert 0.02 < saturated.mean() < 0.98
            assert values(report, layer, "saturation") == pytest.approx(means(saturated, keep))
            applied = limit * (force / limit).tanh() if cap == "tanh" else force.clamp(max=limit)
        else:
            assert values(report, layer, "saturation") == [None, None]
        assert values(report, layer, "mean_force") == pytest.approx(means(applied, keep), **CLOSE)
        hidden = force.masked_fill(~keep, 0.0)
        largest = hidden.amax((0, 2, 3)).tolist()
        assert values(report, layer, "max_force") == pytest.approx(largest, **CLOSE)
        for name, of in (("mean", "mean"), ("min", "amin"), ("max", "amax")):
            expected = getattr(mass, of)((0, 2)).tolist()
            assert values(report, layer, f"{name}_mass") == pytest.approx(expected, **CLOSE)
        assert report.layers[layer].hawking_limit == limit
        assert report.layers[layer].curvature_active


def test_entropy_of_an_lgt_is_that_of_its_weights() -> None:
    model = tiny_lgt()
    with torch.no_grad():
        attentions = model(token_ids(), output_attentions=True).attentions
    report = reported(model, token_ids())
    for layer, weights in enumerate(attentions):
        assert values(report, layer, "entropy") == pytest.approx(
            entropy_of(weights).tolist(), **CLOSE
        )


def test_power_law_forces_are_what_weights_go_as() -> None:
    model = tiny_lgt(force_law="power")
    with torch.no_grad():
        attentions = model(token_ids(), output_attentions=True).attentions
    report = reported(model, token_ids())
    assert report.layers[0].hawking_limit is None
    assert values(report, 1, "entropy") == pytest.approx(
        entropy_of(attentions[1]).tolist(), **CLOSE
    )


def test_padding_counts_neither_as_a_query_nor_as_a_key() -> None:
    model = tiny_lgt()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    padded = reported(model, token_ids(), attention_mask=mask)
    whole, short = (
        reported(model, token_ids()[i : i + 1, start:]) for i, start in ((0, 0), (1, 4))
    )
    pairs = [n * (n + 1) / 2 for n in (LENGTH, LENGTH - 4)]
    for layer in range(2):
        force = [values(x, layer, "mean_force") for x in (whole, short)]
        entropy = [values(x, layer, "entropy") for x in (whole, short)]
        for head in range(2):
            expected = (force[0][head] * pairs[0] + force[1][head] * pairs[1]) / sum(pairs)
            assert values(padded, layer, "mean_force")[head] == pytest.approx(expected, **CLOSE)
            sums = entropy[0][head] * LENGTH + entropy[1][head] * (LENGTH - 4)
            expected = sums / (2 * LENGTH - 4)
            assert values(padded, layer, "entropy")[head] == pytest.approx(expected, **CLOSE)
            least = min(values(x, layer, "min_mass")[head] for x in (whole, short))
            most = max(values(x, layer, "max_mass")[head] for x in (whole, short))
            mass = [values(x, layer, "mean_mass")[head] for x in (whole, short)]
            mean = (mass[0] * LENGTH + mass[1] * (LENGTH - 4)) / (2 * LENGTH - 4)
            found = [values(padded, layer, f"{x}_mass")[head] for x in ("min", "mean", "max")]
            assert found == pytest.approx([least, mean, most], **CLOSE)


def test_padding_of_an_encoder_is_no_query_though_it_sees_all_tokens() -> None:
    model = patch_with_gravity(tiny_host("bert"), GravityConfig(epsilon=0.5))
    ids, mask = tiny_inputs("bert", batch=1, length=8).values()
    alone = reported(model, input_ids=ids[:, :5])
    mask = mask.clone()
    mask[:, 5:] = 0
    padded = reported(model, input_ids=ids, attention_mask=mask)
    for name in ("mean_force", "max_force", "entropy"):
        expected = values(alone, 1, name)
        assert values(padded, 1, name) == pytest.approx(expected, rel=1e-4), name


class _Spy:
    def __init__(self) -> None:
        self.call: AttentionCall | None = None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.call = call
        return call.gravity()


@pytest.mark.parametrize("law", ["force", "power"])
def test_forces_of_a_converted_host_are_the_true_ones(law: str) -> None:
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(law=law, epsilon=0.5))
    inputs = tiny_inputs("qwen2")
    module = model.model.layers[1].self_attn
    module.gravity.observer = spy = _Spy()
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[1]
    module.gravity.observer = None
    query, key = spy.call.query.double(), spy.call.key.double().repeat_interleave(3, 1)
    distance = (query[:, :, :, None] - key[:, :, None]).square().sum(-1) + 0.5
    mass = module.gravity().mass.detach().double()[:, None, None]
    force = distance ** -mass.square() if law == "power" else mass.square() / distance
    report = reported(model, **inputs)
    assert [layer.name for layer in report.layers] == [
        f"model.layers.{i}.self_attn" for i in range(3)
    ]
    keep = causal(query.shape[2])
    assert values(report, 1, "mean_force") == pytest.approx(means(force, keep), **CLOSE)
    assert values(report, 1, "entropy") == pytest.approx(entropy_of(weights).tolist(), **CLOSE)
    assert values(report, 1, "mean_mass") == pytest.approx(mass.flatten().tolist(), **CLOSE)
    assert report.layers[1].saturation is None
    assert not report.layers[1].curvature_active


def test_streams_of_a_tri_model_are_watched() -> None:
    inputs = {f"{x}_inputs_embeds": torch.randn(1, 5, 16) for x in ("world", "self", "env")}
    report = reported(tiny_tri(), **inputs)
    assert [layer.name.split(".")[0] for layer in report.layers] == [
        "world_model",
        "self_model",
        "env_model",
    ]
    assert all(layer.mean_force > 0 for layer in report.layers)


def test_a_module_that_runs_twice_is_reported_twice() -> None:
    model = patch_with_gravity(tiny_host("one module called by all layers"), GravityConfig())
    report = reported(model, **tiny_inputs("bert"))
    assert len(report.layers) == 3
    assert len({layer.name for layer in report.layers}) == 1


def test_sampled_rows_are_spread_over_the_sequence() -> None:
    model = tiny_lgt()
    everything, some = (reported(model, token_ids(), rows=rows) for rows in (None, 3))
    assert (everything.layers[0].rows, some.layers[0].rows) == (LENGTH, 3)
    force, _ = lgt_forces(model, token_ids())[0]
    rows = torch.tensor([0, 4, 8])
    keep = causal(LENGTH)[rows]
    expected = means(force[:, :, rows].clamp(max=50.0), keep)
    assert values(some, 0, "mean_force") == pytest.approx(expected, **CLOSE)


def test_watching_changes_nothing_and_leaves_nothing() -> None:
    model = tiny_lgt()
    with torch.no_grad():
        before = model(token_ids()).logits
        mirror = MirrorLayer()
        with mirror.watch(model) as watched:
            assert watched is mirror
            during = model(token_ids()).logits
    assert torch.equal(before, during)
    _assert_unwatched(model)


def _assert_unwatched(model: Any) -> None:
    for copies in observed_modules(model).values():
        assert all(module.observer is None for module in copies)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


def test_nothing_is_left_after_an_error() -> None:
    model = tiny_lgt()
    mirror = MirrorLayer()
    with pytest.raises(ValueError), mirror.watch(model):  # noqa: PT012
        model(torch.ones(1, 100, dtype=torch.long))
    _assert_unwatched(model)
    with torch.no_grad(), mirror.watch(model):
        model(token_ids())
    assert len(mirror.report().layers) == 2


def test_what_checkpointing_computes_again_is_not_counted() -> None:
    model = tiny_lgt(dropout=0.0).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mirror = MirrorLayer()
    with mirror.watch(model):
        model(token_ids(), labels=token_ids()).loss.backward()
    assert len(mirror.report().layers) == 2


def test_two_do_not_watch_one_model() -> None:
    model, first, second = tiny_lgt(), MirrorLayer(), MirrorLayer()
    with first.watch(model), pytest.raises(RuntimeError, match="nobody watches"):  # noqa: SIM117
        with second.watch(model):
            pass
    _assert_unwatched(model)


def test_a_model_without_gravity_is_refused() -> None:
    with pytest.raises(TypeError, match="gravity"), MirrorLayer().watch(torch.nn.Linear(2, 2)):
        pass


def test_a_report_needs_a_forward() -> None:
    model, mirror = tiny_lgt(), MirrorLayer()
    with pytest.raises(RuntimeError, match="expected a forward"):
        mirror.report()
    with mirror.watch(model):
        model.model(token_ids())  # a part of it
    with pytest.raises(RuntimeError, match="expected a forward"):
        mirror.report()


def test_a_report_is_logged_once() -> None:
    model = tiny_lgt()
    ledger = Ledger()
    calls: list[tuple[int, str]] = []
    mirror = MirrorLayer(ledger, 1e-3, correction_callback=lambda *x: calls.append(x))
    with torch.no_grad(), mirror.watch(model):
        model(token_ids())
        report = mirror.report()
        assert mirror.report() is report
        assert calls == [(0, "attention_dampening"), (1, "attention_dampening")]
        model(token_ids())
        assert mirror.report() is not report
    events = [entry.event for entry in ledger.entries()]
    assert events == ["mirror_layer", "containment_correction"] * 4
    logged = ledger.entries("mirror_layer")[0].payload
    assert logged["mean_force"] == report.layers[0].mean_force
    assert logged["name"] == "model.layers.0.attn"
    diagnostics = report.diagnostics()["layers"]
    assert [layer["layer"] for layer in diagnostics] == [0, 1]
    json.dumps(diagnostics, allow_nan=False)


def test_the_published_call_gives_the_published_scores_and_lines() -> None:
    golden = json.loads(GOLDEN.read_text())["mirror"]
    mirror = MirrorLayer(None, golden["max_force_threshold"], golden["stability_window"])
    for layer, step in enumerate(golden["sequence"]):
        shared = {"mean_mass": 0.5, "curvature_active": True, "hawking_limit": 50.0}
        mirror(layer, {"mean_force": step["mean_force"], **shared})
        assert mirror.stability_score() == pytest.approx(step["score"], rel=1e-12)
    logged = [[entry.event, entry.payload] for entry in mirror.ledger.entries()]
    assert logged == golden["ledger"]
    assert [list(payload) for _, payload in logged] == [list(x) for _, x in golden["ledger"]]
    assert mirror.ledger.agent_id == golden["agent_id"]


def test_a_force_that_is_no_number_is_not_stable() -> None:
    mirror = MirrorLayer()
    mirror(0, {"mean_force": float("nan")})
    assert mirror.stability_score() == 0.0
    assert mirror.ledger.entries("containment_correction")


@pytest.mark.parametrize(
    "wrong", [{"max_force_threshold": 0.0}, {"stability_window": 0}, {"rows": 0}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        MirrorLayer(**wrong)
