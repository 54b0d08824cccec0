"""The loop: published numbers, nothing lost or drawn in vain, resumed bit for bit."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from training.lgt_cases import (
    VOCABULARY,
    RandomText,
    assert_same,
    golden_numbers,
    golden_tensors,
    state_of,
    tiny_lgt,
)
from transformers import AutoModelForCausalLM

from gravity_hf.models.lgt.convert_lgt import model_from_published
from gravity_hf.runtime import Ledger, read_ledger
from gravity_hf.training.containment_protocol import ContainmentConfig
from gravity_hf.training.loop import TrainingConfig, TrainingLoop


def next_token_loss(logits, targets):
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


class Published(nn.Module):
    """A converted checkpoint that talks as the published model does: `(logits, diagnostics)`, the
    "force" of a layer being that of its first head, seen on the layer's output."""

    def __init__(self, state):
        super().__init__()
        self.lgt = model_from_published(state, curvature=0.15, dropout=0.0)
        self.config = self.lgt.config

    def forward(self, ids, return_diagnostics=False):
        seen = []
        layer = self.lgt.model.layers[0]
        hook = layer.register_forward_hook(lambda m, i, output: seen.append(output.hidden))
        logits = self.lgt(ids).logits
        hook.remove()
        if not return_diagnostics:
            return logits, None
        with torch.no_grad():
            terms = layer.attn.gravity(seen[0])
        force = (terms.strength[0] * terms.mass[:, 0].mean() ** 2).item()
        return logits, {"layers": [{"mean_force": force}]}


def published_batches(kind, count):
    tensors = golden_tensors("loop/in")
    x, y = ("x", "y") if kind == "train" else ("vx", "vy")
    return [(tensors[f"{x}{i}"], tensors[f"{y}{i}"]) for i in range(count)]


def published_loop(config, containment, ledger=None):
    model = Published(golden_tensors("loop/state"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"checkpoint_every": 0, "progress": False, **config}
    return TrainingLoop(
        model, optimizer, next_token_loss, TrainingConfig(**options),
        ContainmentConfig(**containment), ledger,
    )  # fmt: skip


@pytest.fixture(scope="module")
def published_fit():
    case, ledger, called = golden_numbers("loop"), Ledger("training"), []
    # What the published loop does: the term every tenth step, on the logits, without a floor.
    terms = {"bekenstein_every": 10, "bekenstein_floor": None}
    curvature = {"use_meta_curvature": True, "meta_curvature_smoothing": 0.0}
    loop = published_loop({**case["config"], **terms, **curvature}, case["containment"], ledger)
    train, val = published_batches("train", 14), iter(published_batches("val", 4))
    summary = loop.fit(train, val, called.append)
    return case, loop, ledger, summary, called


def assert_told(told, expected, rel):
    assert told.keys() == expected.keys()
    for key, value in expected.items():
        close = pytest.approx(value, rel=rel) if isinstance(value, float) else value
        assert told[key] == close, key


def test_losses_and_summary_are_the_published_ones(published_fit):
    case, loop, _, summary, called = published_fit
    assert loop.losses[:6] == pytest.approx(case["losses"][:6], rel=2e-6)
    assert loop.losses == pytest.approx(case["losses"], rel=1e-4)
    assert summary["final_loss"] == loop.losses[-1]
    assert summary["steps"] == case["summary"]["steps"]
    for proposals in (summary["proposals"], called, loop.proposals):
        for one, expected in zip(proposals, case["on_proposal_calls"], strict=True):
            assert_told(one, expected, 1e-6)


def test_ledger_lines_are_the_published_ones(published_fit):
    case, _, ledger, _, _ = published_fit
    lines = [(entry.event, entry.payload) for entry in ledger.entries()]
    assert [event for event, _ in lines] == [event for event, _ in case["ledger"]]
    for index, (event, expected) in enumerate(case["ledger"]):
        payload = lines[index][1]
        if event == "meta_curvature_update":
            # Our parameter has another name.
            (payload,), (expected,) = payload["updates"].values(), expected["updates"].values()
            assert payload == pytest.approx(expected, rel=1e-5)
        else:
            # From the seventh gradient on rounding shows: positions nearly meet, where their
            # gradients are large. A float64 run is twice as far from the published norms.
            clips = sum(event == "grad_clip" for event, _ in case["ledger"][: index + 1])
            assert_told(payload, expected, 1e-4 if clips <= 6 else 2e-2)


def test_weights_end_as_published(published_fit):
    _, loop, _, _, _ = published_fit
    first, last = (
        model_from_published(golden_tensors(f"loop/{when}"), curvature=0.15).state_dict()
        for when in ("state", "final")
    )
    for name, tensor in loop.model.lgt.state_dict().items():
        way = (last[name] - first[name]).norm()
        assert (tensor - last[name]).norm() <= 1e-2 * way, name


def test_accumulated_steps_give_the_published_results():
    case = golden_numbers("accum")
    loop = published_loop({**case["config"], "use_bekenstein_penalty": False}, {})
    for batch, expected in zip(published_batches("train", 7), case["results"], strict=True):
        result = loop.train_step(batch)
        assert result.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
        assert result == expected


def text_batches(seed=0, shuffle=True):
    ids = RandomText().ids
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(ids[:, :-1], ids[:, 1:])
    return DataLoader(data, batch_size=4, shuffle=shuffle, generator=generator)


def loop_of(folder, model=None, ledger=None, **config):
    model = tiny_lgt(num_hidden_layers=2) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    options = {"max_steps": 8, "checkpoint_every": 0, "progress": False, **config}
    return TrainingLoop(
        model, optimizer, next_token_loss, TrainingConfig(checkpoint_dir=str(folder), **options),
        ledger=ledger, scheduler=scheduler,
    )  # fmt: skip


RESUMED = {
    "max_steps": 8, "checkpoint_every": 4, "eval_every": 2, "log_every": 1, "diagnostics_every": 3,
    "use_meta_curvature": True, "grad_accumulation_steps": 2,
}  # fmt: skip


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    val = [(ids[:, :-1], ids[:, 1:]) for ids in RandomText(24).ids.split(4)]
    whole = loop_of(tmp_path, **RESUMED)
    summary = whole.fit(text_batches(), iter(val))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-8"]

    torch.manual_seed(99)
    resumed = loop_of(tmp_path, **RESUMED)
    resumed_summary = resumed.fit(text_batches(), iter(val), resume=tmp_path / "step-4")
    assert resumed_summary == summary
    assert resumed.losses == whole.losses
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()
    assert resumed.containment.state_dict() == whole.containment.state_dict()
    assert resumed.meta_curvature.level == whole.meta_curvature.level is not None
    # True continues from the newest one: here there is nothing left to do.
    assert loop_of(tmp_path, **RESUMED).fit(text_batches(), iter(val), resume=True) == summary


def test_a_checkpoint_loads_as_a_model_and_runs_no_code(tmp_path):
    loop = loop_of(tmp_path, max_steps=2, checkpoint_every=2)
    loop.fit(text_batches())
    folder = tmp_path / "step-2"
    torch.load(folder / "optimizer.pt", weights_only=True)
    assert_same(state_of(AutoModelForCausalLM.from_pretrained(folder)), state_of(loop.model))


def test_a_curvature_that_grew_is_resumed_and_other_settings_are_refused(tmp_path):
    loop = loop_of(tmp_path, tiny_lgt(dropout=0.0), max_steps=2, checkpoint_every=2)
    loop.model.curvature = 0.3
    loop.fit(text_batches())
    resumed = loop_of(tmp_path, tiny_lgt(dropout=0.0), max_steps=2)
    resumed.fit(text_batches(), resume=True)
    assert resumed.model.curvature == 0.3
    other = loop_of(tmp_path, tiny_lgt(dropout=0.0, softening=0.5), max_steps=2)
    before = state_of(other.model)
    with pytest.raises(ValueError, match="the same curvature, softening"):
        other.fit(text_batches(), resume=True)
    assert_same(state_of(other.model), before)


def test_a_file_beside_a_checkpoint_is_not_lost(tmp_path):
    loop = loop_of(tmp_path, max_steps=0)
    loop.save(tmp_path / "c")
    (tmp_path / "c" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        loop.save(tmp_path / "c")
    assert (tmp_path / "c" / "mine.txt").exists()


def test_tied_weights_survive_a_checkpoint(tmp_path):
    loop = loop_of(tmp_path, tiny_lgt(tie_word_embeddings=True), max_steps=2, checkpoint_every=1)
    loop.fit(text_batches())
    again = loop_of(tmp_path, tiny_lgt(tie_word_embeddings=True), max_steps=2)
    again.fit(text_batches(), resume=True)
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    assert_same(state_of(again.model), state_of(loop.model))


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    loop = loop_of(tmp_path, max_steps=2)
    loop.fit(text_batches())
    loop.save(tmp_path / "step-2")
    before = load_file(tmp_path / "step-2" / "model.safetensors")
    loop.train_step(next(iter(text_batches())))
    loop.losses.append(object())
    with pytest.raises(TypeError):
        loop.save(tmp_path / "step-2")
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert_same(load_file(tmp_path / "step-2" / "model.safetensors"), before)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: None, FileNotFoundError, "step-<n>"),
        (lambda folder: (folder / "step-3").mkdir(parents=True), FileNotFoundError, "without"),
    ],
    ids=["nothing there", "not whole"],
)
def test_what_cannot_be_resumed_from_is_refused(spoil, error, message, tmp_path):
    spoil(tmp_path / "runs")
    with pytest.raises(error, match=message):
        loop_of(tmp_path / "runs").fit(text_batches(), resume=True)


def test_a_run_with_fewer_batches_than_were_trained_on_is_refused(tmp_path):
    loop_of(tmp_path, max_steps=4, checkpoint_every=4).fit(text_batches())
    with pytest.raises(ValueError, match="batches of the first run"):
        loop_of(tmp_path).fit(itertools.islice(text_batches(), 2), resume=True)


def test_the_ledger_tells_from_where_a_run_went_on(tmp_path):
    options = {"max_steps": 4, "checkpoint_every": 2, "log_every": 1, "diagnostics_every": 0}
    first = loop_of(tmp_path, ledger=Ledger("first", tmp_path / "log.jsonl"), **options)
    first.fit(text_batches())
    ledger = Ledger("second", tmp_path / "log.jsonl")
    second = loop_of(tmp_path, ledger=ledger, **options)
    second.fit(text_batches(), resume=tmp_path / "step-2")
    ledger.flush()
    assert ledger.verify().ok
    lines = list(read_ledger(tmp_path / "log.jsonl"))
    (resumed,) = (entry for entry in lines if entry.event == "training_resumed")
    known = lines[: resumed.payload["ledger"]["count"]]
    assert [e.payload["step"] for e in known if e.event == "train_step"] == [1, 2]


def test_no_batch_is_drawn_that_is_not_trained_on(tmp_path):
    drawn = iter(list(text_batches()))
    loop_of(tmp_path, max_steps=3).fit(drawn)
    assert len(list(drawn)) == 8 - 3


def test_a_window_that_is_not_filled_is_stepped_as_the_mean_of_its_batches(tmp_path):
    batches = list(text_batches())[:1]

    def trained(window):
        model = tiny_lgt(dropout=0.0)
        loop_of(tmp_path, model, grad_accumulation_steps=window).fit(batches)
        return state_of(model)

    one, tail = trained(1), trained(4)
    # Scaled by powers of 2.
    assert_same(tail, one)


def test_an_evaluation_leaves_model_and_mode_as_they_were(tmp_path):
    loop = loop_of(tmp_path)
    loop.model.train()
    before, batch = state_of(loop.model), next(iter(text_batches()))
    first = loop.eval_step(batch)
    # Without dropout, hence the same again.
    assert loop.eval_step(batch) == first != pytest.approx(0)
    assert loop.model.training
    assert_same(state_of(loop.model), before)


def test_all_batches_of_a_list_are_evaluated_each_time(tmp_path):
    ledger, val = Ledger(), list(text_batches(shuffle=False))[:3]
    loop = loop_of(tmp_path, ledger=ledger, max_steps=3, eval_every=2, log_every=0)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    loop.fit(text_batches(), val)
    mean = sum(map(loop.eval_step, val)) / 3
    told = [(e.payload["step"], e.payload["val_loss"]) for e in ledger.entries("eval_step")]
    assert told == [(1, pytest.approx(mean)), (3, pytest.approx(mean))]


def test_true_forces_decide_on_damping(tmp_path):
    ledger, model = Ledger(), tiny_lgt()
    loop = loop_of(tmp_path, model, ledger, max_steps=1)
    before = model.model.layers[0].attn.gravity.G.detach().clone()
    object.__setattr__(loop.containment.config, "max_attention_force", 1e-3)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    loop.fit(text_batches())
    torch.testing.assert_close(model.model.layers[0].attn.gravity.G.detach(), 0.9 * before)
    (measured,) = ledger.entries("mirror_layer")
    (damped,) = ledger.entries("attention_dampening")
    assert damped.payload["mean_force"] == measured.payload["mean_force"] > 1e-3
    assert model.model.layers[0].attn.gravity.observer is None


def test_a_loss_that_is_nan_stops_before_the_model_is_changed(tmp_path):
    ledger, model = Ledger(), tiny_lgt()
    loop = loop_of(tmp_path, model, ledger, diagnostics_every=0)
    loop.loss_fn = lambda logits, targets: logits.sum() * math.nan
    before = state_of(model)
    assert loop.fit(text_batches())["steps"] == 1
    assert_same(state_of(model), before)
    events = [entry.event for entry in ledger.entries()]
    assert events == ["containment_stop", "training_stopped"]


def test_the_term_acts_on_hidden_states_at_every_step(tmp_path):
    batches = list(text_batches())[:2]

    def losses(**config):
        loop = loop_of(tmp_path, tiny_lgt(dropout=0.0), max_steps=2, **config)
        object.__setattr__(loop.containment.config, "bekenstein_lambda", 0.5)
        loop.optimizer.param_groups[0]["lr"] = 0.0
        loop.fit(batches)
        return loop.losses

    # States leave norms with gains of 1: variance d / (d - 1).
    term = 0.25 * math.log(2 * math.pi * math.e * 16 / 15)
    plain = losses(use_bekenstein_penalty=False)
    assert losses() == pytest.approx([loss + term for loss in plain], rel=1e-3)


def test_inputs_by_name_and_any_module_are_trained(tmp_path):
    ids = torch.randint(VOCABULARY, (2, 8))
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert math.isfinite(loop_of(tmp_path).train_step((named, ids))["loss"])
    plain = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))
    loop = loop_of(tmp_path, plain, max_steps=2, checkpoint_every=2)
    loop.fit([(ids, ids)] * 2)
    assert json.loads((tmp_path / "step-2" / "loop.json").read_text())["step"] == 2


@pytest.mark.parametrize("wrong", [{"grad_accumulation_steps": 0}, {"eval_every": -1}])
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match="TrainingConfig"):
        TrainingConfig(**wrong)
