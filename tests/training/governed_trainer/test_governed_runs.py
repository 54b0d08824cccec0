"""Governed runs as a whole: resumed to the bit, written down, cheaper where they say so."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from training.governed_trainer.governed_cases import (
    EAGER,
    LENGTH,
    NEVER,
    RandomText,
    arguments,
    assert_same,
    governed_trainer,
    small,
    state_of,
    tiny_llama,
)
from transformers import Trainer, TrainerCallback

from gravity_hf.runtime.ledger import read_ledger
from gravity_hf.runtime.verification import verify
from gravity_hf.training.governed import (
    AuditSettings,
    EvaluationSettings,
    ForgeGateSettings,
    GovernorSettings,
    HierarchySettings,
    ParameterGroups,
    RouterSettings,
)
from gravity_hf.training.governed.data import RescoringCallback, Tier, TieredSampler
from gravity_hf.training.governed.freezing import freeze_all_but
from gravity_hf.training.governed.probe import ProbeData, loss_of
from gravity_hf.training.governed.routing import BatchRouting

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 16}
# Groups converge, are probed and awaken within the run.
LIVELY: dict[str, Any] = {
    "governors": EAGER,
    "hierarchy": HierarchySettings(warmup_steps=3, patience_fraction=0.25),
    "count_flops": True,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that was not interrupted, with its ledger."""
    folder = tmp_path_factory.mktemp("whole")
    model, ledger = tiny_llama(), folder / "governed.jsonl"
    governed = small(**LIVELY, audit=AuditSettings(ledger, every=2))
    governed_trainer(governed, model, folder, **SAVING).train()
    return {
        "folder": folder, "ledger": ledger, "state": state_of(model), "report": governed.report(),
    }  # fmt: skip


@pytest.mark.parametrize("step", [3, 9, 15])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(step, whole, tmp_path):
    torch.manual_seed(99)
    model, governed = tiny_llama(), small(**LIVELY)
    trainer = governed_trainer(governed, model, tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=str(whole["folder"] / f"checkpoint-{step}"))
    assert_same(state_of(model), whole["state"])
    assert governed.report() == whole["report"]
    # What happened before and after is not the same: the state had to be resumed.
    steps = {change["step"] for change in whole["report"]["changes"]}
    assert min(steps) <= step < max(steps) or step == 15
    assert len(whole["report"]["changes"]) > 5


def test_a_checkpoint_without_a_state_is_refused(whole, tmp_path):
    checkpoint = shutil.copytree(whole["folder"] / "checkpoint-3", tmp_path / "checkpoint-3")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["GovernedCallback"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    trainer = governed_trainer(small(**LIVELY), tiny_llama(), tmp_path, **SAVING)
    with pytest.raises(ValueError, match="checkpoint of a governed run"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_other_machines_is_refused(whole, tmp_path):
    trainer = governed_trainer(small(hierarchy=None), tiny_llama(), tmp_path, **SAVING)
    with pytest.raises(ValueError, match="a run with other settings"):
        trainer.train(resume_from_checkpoint=str(whole["folder"] / "checkpoint-3"))


def test_governance_lies_beside_trainer_s_state(whole):
    folder = whole["folder"] / "checkpoint-9"
    content = json.loads((folder / "governance.json").read_text())
    stored = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
    assert content["state"] == stored["GovernedCallback"]["attributes"]["progress"]
    assert content["step"] == 9 == content["report"]["steps"]


def test_the_ledger_holds_and_tells_what_the_report_tells(whole):
    assert verify(whole["ledger"]).ok
    entries = list(read_ledger(whole["ledger"]))
    changes = [e.payload for e in entries if e.event == "governed_change"]
    assert changes == whole["report"]["changes"]
    begun = [e.payload["level"] for e in entries if e.event == "governed_activation"]
    assert begun == [a["level"] for a in whole["report"]["activations"]]
    steps = [e.payload["step"] for e in entries if e.event == "governed_step"]
    assert steps == list(range(2, 17, 2))
    saved = [e.payload["step"] for e in entries if e.event == "governed_checkpoint"]
    assert saved == [3, 6, 9, 12, 15, 16]


def test_changed_weights_are_not_resumed(whole, tmp_path):
    folder = shutil.copytree(whole["folder"], tmp_path / "copy")
    file = folder / "checkpoint-6" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    audit = AuditSettings(folder / "governed.jsonl")
    for step, changed in ((9, False), (6, True)):
        trainer = governed_trainer(small(**LIVELY, audit=audit), tiny_llama(), folder, **SAVING)
        checkpoint = str(folder / f"checkpoint-{step}")
        if changed:
            with pytest.raises(ValueError, match="expected the weights that .* notes for step 6"):
                trainer.train(resume_from_checkpoint=checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)


def test_an_edited_ledger_is_not_written_on(whole, tmp_path):
    copy = tmp_path / "governed.jsonl"
    for name in ("", ".head"):
        source = whole["ledger"].with_name(f"governed.jsonl{name}")
        copy.with_name(f"governed.jsonl{name}").write_bytes(source.read_bytes())
    text = copy.read_text().replace("ACTIVE", "COOLING", 1)
    copy.write_text(text)
    trainer = governed_trainer(small(audit=AuditSettings(copy)), tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="expected a ledger whose chain holds"):
        trainer.train()


def test_a_ledger_with_a_key_needs_it(tmp_path, monkeypatch):
    audit = AuditSettings(tmp_path / "governed.jsonl", key_env="GOVERNED_TEST_KEY")
    with pytest.raises(ValueError, match="GOVERNED_TEST_KEY"):
        governed_trainer(small(audit=audit), tiny_llama(), tmp_path).train()
    key = "0123456789abcdef0123456789abcdef"
    monkeypatch.setenv("GOVERNED_TEST_KEY", key)
    governed_trainer(small(audit=audit), tiny_llama(), tmp_path).train()
    assert verify(audit.path, key=key.encode()).ok
    assert not verify(audit.path, key=b"another key of the same kind....").ok


def test_the_backward_that_is_not_done_is_the_one_that_was_counted(tmp_path):
    """A training batch, counted from outside while its groups are frozen."""
    model, governed = tiny_llama(), small(governors=EAGER, hierarchy=None, count_flops=True)
    trainer = governed_trainer(governed, model, tmp_path, max_steps=12)
    counted: list[int] = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            batch = {"input_ids": torch.zeros(4, LENGTH, dtype=torch.long)}
            loss = model(**batch, labels=batch["input_ids"]).loss
            with FlopCounterMode(display=False) as counter:
                loss.backward()
            counted.append(counter.get_total_flops())
            model.zero_grad()

    trainer.add_callback(Count())
    trainer.train()
    flops = governed.report()["flops"]
    assert sum(counted) / len(counted) == pytest.approx(flops["backward"])
    assert counted[0] == flops["backward_full"] and flops["backward_saved"] > 0.01
    assert flops["probes"] > 0


def test_a_change_makes_trainer_evaluate_within_its_budget(tmp_path):
    limits = EvaluationSettings(
        max_evaluations_per_window=2, window_steps=100, staleness_steps=None
    )
    governed = small(governors=EAGER, hierarchy=None, evaluation=limits)
    # Never by itself: the first evaluation would be at step 1000.
    options = {"eval_strategy": "steps", "eval_steps": 1000, "max_steps": 12}
    trainer = governed_trainer(governed, tiny_llama(), tmp_path, **options)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    changes = [change["step"] for change in governed.report()["changes"]]
    # The last is Trainer's own, at the end.
    assert len(changes) > 2 and steps[2:] == [12]
    assert steps[0] == changes[0] and steps[1] in changes


def test_metrics_of_one_s_own_leave_no_trace_in_the_training(tmp_path):
    def trained(name, **settings):
        model = tiny_llama()
        governed = small(governors=EAGER, hierarchy=None, **settings)
        governed_trainer(governed, model, tmp_path / name, max_steps=10).train()
        return state_of(model)

    seen = []

    def noisy(model):
        seen.append((model.training, torch.is_grad_enabled(), torch.rand(3)))
        return len(seen)

    assert_same(trained("with", metrics={"noise": noisy}), trained("without"))
    assert seen and not any(training or grads for training, grads, _ in seen)


def test_a_batch_gives_gradients_to_the_groups_it_is_routed_to(tmp_path):
    router = RouterSettings(min_active_groups=2, max_active_groups=2)
    probed = GovernorSettings(**{**vars(NEVER), "probe_interval": 3})
    settings = {
        "governors": probed, "hierarchy": None, "router": router, "count_flops": True,
    }  # fmt: skip
    model, governed = tiny_llama(), small(**settings)
    trainer = governed_trainer(governed, model, tmp_path / "whole", **SAVING)
    counts = []

    class Count(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            members = governed.members()
            counts.append({n for n, ps in members.items() if any(p.grad is not None for p in ps)})

    trainer.add_callback(Count())
    trainer.train()
    assert {len(groups) for groups in counts} == {2}
    report = governed.report()
    assert [fit["step"] for fit in report["captured"]] == [0, 3, 6, 9, 12, 15]
    assert all(0 < fit["router"] <= fit["oracle"] + 1e-6 for fit in report["captured"])
    # The backward of all others was not done.
    assert report["flops"]["backward_saved"] > 0.1

    resumed, again = tiny_llama(), small(**settings)
    trainer = governed_trainer(again, resumed, tmp_path / "again", **SAVING)
    checkpoint = str(tmp_path / "whole" / "checkpoint-9")
    trainer.train(resume_from_checkpoint=checkpoint)
    assert_same(state_of(resumed), state_of(model))
    assert again.report() == report
    # Afterwards batches are not routed any more.
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_embeddings_learn_from_every_batch_that_is_routed_to_them():
    """Once they were frozen for all batches of a step after one that was not routed to them."""
    model = tiny_llama()
    members = {group.name: group.trained_parameters for group in ParameterGroups.of(model)}
    data = ProbeData(RandomText(), torch.utils.data.default_collate, 2, 0, torch.device("cpu"))
    routing = BatchRouting(model, members, RouterSettings(max_active_groups=2), data)
    routing.begin(set(members))
    bias = {"embeddings": 100.0, "output_head": 50.0}
    with torch.no_grad():
        routing.router.up.bias.copy_(torch.tensor([bias.get(name, -100.0) for name in members]))
    freeze_all_but(members, {"output_head"})
    loss_of(model, data.batch(0)).backward()
    assert routing.routed == {"embeddings", "output_head"}
    assert model.model.embed_tokens.weight.grad is not None
    assert int(routing.router.inputs) == 1 and int(routing.router.routed.sum()) == 2
    routing.close()


def test_facts_wait_until_their_groups_have_settled(tmp_path):
    settled = GovernorSettings(**{**vars(EAGER), "reactivation_probes": 1000})
    governed = small(
        governors=settled,
        hierarchy=None,
        forge=ForgeGateSettings(stability_window=2),
        forge_domains={"chemistry": ["output_head"]},
    )
    ready = []

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ready.append(governed.forge_gate.is_ready("chemistry"))

    trainer = governed_trainer(governed, tiny_llama(), tmp_path, max_steps=12)
    trainer.add_callback(Ask())
    trainer.train()
    (step,) = [
        change["step"]
        for change in governed.report()["changes"]
        if (change["group"], change["new_state"]) == ("output_head", "CONVERGED")
    ]
    assert ready == [False] * step + [True] * (12 - step)


def test_samples_are_counted_where_the_sampler_counts_them(tmp_path):
    data, order = RandomText(16), TieredSampler(size=16, seed=0)
    governed = small()

    class Tiered(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return order

    model, args = tiny_llama(), arguments(tmp_path, max_steps=4)
    rescoring = RescoringCallback(order, data, every=2, fraction=0.5)
    optimizers = governed.optimizers(model, args)
    callbacks = [rescoring, governed.callback()]
    Tiered(model, args, train_dataset=data, callbacks=callbacks, optimizers=optimizers).train()
    samples = governed.report()["samples"]
    # One epoch: each sample once, and all of them scored on the way.
    assert samples["unique"] == samples["draws"] == samples["size"] == 16
    assert Tier.UNKNOWN not in order.tiers
