"""Governed training in Trainer: what is reported is what is done, and nothing else is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from training.governed_trainer.governed_cases import (
    EAGER,
    NEVER,
    RandomText,
    assert_same,
    governed_trainer,
    plain_trainer,
    small,
    state_of,
    tiny_llama,
)
from transformers import TrainerCallback

from gravity_hf.training.governed import BudgetSettings, GovernedTraining, HierarchySettings
from gravity_hf.training.governed.optimizers import GROUP_KEY


class Watch(TrainerCallback):
    """What each optimiser step found: rates over those scheduled, frozen groups, their weights."""

    def __init__(self, governed: GovernedTraining) -> None:
        self.governed = governed
        self.steps: list[dict[str, Any]] = []
        self._before: dict[str, list[torch.Tensor]] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        members = self.governed.members()
        self.frozen = {n for n, ps in members.items() if not any(p.requires_grad for p in ps)}
        self._before = {n: [p.detach().clone() for p in ps] for n, ps in members.items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        scheduled = kwargs["lr_scheduler"].get_last_lr()
        rates = {
            group[GROUP_KEY]: group["lr"] / rate
            for group, rate in zip(kwargs["optimizer"].param_groups, scheduled, strict=True)
            if rate
        }
        members = self.governed.members()
        grads = {n for n, ps in members.items() if any(p.grad is not None for p in ps)}
        self.steps.append({"rates": rates, "frozen": self.frozen, "with_gradients": grads})

    def on_step_end(self, args, state, control, **kwargs):
        members = self.governed.members()
        moved = {
            name
            for name, parameters in members.items()
            if any(
                not torch.equal(p, b) for p, b in zip(parameters, self._before[name], strict=True)
            )
        }
        self.steps[-1]["moved"] = moved


def watched(governed: GovernedTraining, model: nn.Module, folder: Any, **options: Any) -> Watch:
    trainer = governed_trainer(governed, model, folder, **options)
    watch = Watch(governed)
    trainer.add_callback(watch)
    trainer.train()
    return watch


def test_with_every_machine_off_training_is_trainer_s_own_to_the_bit(tmp_path):
    plain, governed = tiny_llama(), tiny_llama()
    plain_trainer(plain, tmp_path / "plain").train()
    off = GovernedTraining(governors=None, hierarchy=None, budget=None)
    trainer = governed_trainer(off, governed, tmp_path / "governed")
    trainer.train()
    assert_same(state_of(governed), state_of(plain))
    # Trainer has its arguments back, and the report says that nothing was done.
    assert trainer.args.max_grad_norm == 0.5
    assert off.report()["flops"]["backward_saved"] == 0.0
    assert off.report()["mean_multiplier"] == 1.0


def test_the_rates_of_every_step_are_those_that_are_reported(tmp_path):
    governed = small()
    watch = watched(governed, tiny_llama(), tmp_path)
    groups = governed.report()["groups"]
    different = set()
    for name, group in groups.items():
        rates = [step["rates"][name] for step in watch.steps if name not in step["frozen"]]
        assert sum(rates) / len(watch.steps) == pytest.approx(group["multiplier"])
        different |= {round(rate, 6) for rate in rates}
    assert len(different) > 3
    for point in governed.report()["trace"]:
        assert sum(point["allocations"].values()) <= 1 + 1e-12


def test_after_each_step_the_schedule_finds_its_own_rates(tmp_path):
    found = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
            found.append(rates == kwargs["lr_scheduler"].get_last_lr())

    trainer = governed_trainer(small(), tiny_llama(), tmp_path)
    trainer.add_callback(Look())
    trainer.train()
    assert found == [True] * 8


def test_a_frozen_group_has_no_gradient_and_keeps_its_weights(tmp_path):
    governed = small(governors=EAGER, hierarchy=None)
    watch = watched(governed, tiny_llama(), tmp_path, max_steps=12)
    frozen = set.union(*(step["frozen"] for step in watch.steps))
    assert frozen and frozen < set(governed.sizes())
    for step in watch.steps:
        assert step["with_gradients"] == set(governed.sizes()) - step["frozen"]
        assert step["moved"] == step["with_gradients"]
    # Afterwards every weight may be trained again.
    assert all(p.requires_grad for ps in governed.members().values() for p in ps)


def test_levels_begin_one_after_another_and_all_of_them_do(tmp_path):
    governed = small(budget=None)
    watched_steps = watched(governed, tiny_llama(), tmp_path).steps
    report = governed.report()
    begun = {a["level"]: a["step"] for a in report["activations"]}
    assert begun and sorted(begun.values()) == [begun[level] for level in sorted(begun)]
    groups = governed.parameter_groups()
    for name, group in report["groups"].items():
        start = begun.get(groups[name].level, 0)
        assert group["steps"] == len(watched_steps) - start
        assert [name in step["frozen"] for step in watched_steps[:start]] == [True] * start


def test_a_converged_group_awakens_by_its_probes_and_keeps_its_moments(tmp_path):
    governed = small(governors=EAGER, hierarchy=None, budget=None)
    trainer = governed_trainer(governed, tiny_llama(), tmp_path, max_steps=24)
    moments: dict[str, Any] = {}

    class Moments(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            name = next(iter(governed.callback().run.machines.converged()), None)
            for group in kwargs["optimizer"].param_groups:
                if group[GROUP_KEY] == name:
                    kept = kwargs["optimizer"].state[group["params"][0]]["exp_avg"]
                    before = moments.setdefault(name, kept.clone())
                    assert torch.equal(kept, before)

    trainer.add_callback(Moments())
    trainer.train()
    report = governed.report()
    states = [(c["old_state"], c["new_state"]) for c in report["changes"]]
    assert ("CONVERGED", "AWAKENED") in states
    assert moments and report["probes"]


def test_duty_spends_the_budget_on_steps_in_place_of_rates(tmp_path):
    # By what each group took from the loss, which differs most.
    budget = BudgetSettings(eval_window=1, alpha=0.0, beta=1.0, gamma=0.0)
    governed = small(apply="duty", hierarchy=None, budget=budget)
    watch = watched(governed, tiny_llama(), tmp_path, max_steps=12)
    steps = {name: group["steps"] for name, group in governed.report()["groups"].items()}
    assert min(steps.values()) < 12 == max(steps.values())
    for group in governed.report()["groups"].values():
        assert group["multiplier"] == pytest.approx(group["steps"] / 12)
    assert all(rate == 1.0 for step in watch.steps for rate in step["rates"].values())


def test_apply_none_notes_shares_and_leaves_rates_alone(tmp_path):
    governed = small(apply="none", hierarchy=None)
    watch = watched(governed, tiny_llama(), tmp_path)
    assert all(rate == 1.0 for step in watch.steps for rate in step["rates"].values())
    shares = {group["allocation"] for group in governed.report()["groups"].values()}
    assert len(shares) > 1


def test_the_report_says_where_floors_do_not_fit(tmp_path):
    for floor, expected in ((0.02, False), (0.3, True)):
        budget = BudgetSettings(floor_fraction=floor)
        governed = small(budget=budget, hierarchy=None)
        governed_trainer(governed, tiny_llama(), tmp_path, max_steps=1).train()
        assert governed.report()["floor_infeasible"] is expected


def test_a_step_without_any_gradient_is_reported_as_that(tmp_path):
    class Drop(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                kwargs["model"].zero_grad()

    governed = small(hierarchy=None, count_flops=True)
    governed_trainer(governed, tiny_llama(), tmp_path, Drop(), max_steps=3).train()
    report = governed.report()
    assert report["skipped_steps"] == 1
    assert {"groups": [], "steps": 1} in report["learned"]
    assert report["flops"]["backward_saved"] == pytest.approx(1 / 3)


def test_levels_multiply_rates_whatever_the_budget_does(tmp_path):
    levels = HierarchySettings(lr_multipliers={0: 3.0}, warmup_steps=4, patience_fraction=0.25)
    for apply in ("duty", "none"):
        governed = small(apply=apply, hierarchy=levels)
        watch = watched(governed, tiny_llama(), tmp_path / apply, max_steps=4)
        rates = [step["rates"]["embeddings"] for step in watch.steps]
        assert rates == pytest.approx([3.0, 2.5, 2.0, 1.5])


def test_what_a_group_takes_from_the_loss_does_not_depend_on_clipping(tmp_path):
    def gains(limit):
        governed = small(budget=None, hierarchy=None)
        # AdamW's first step is the same for a gradient of any length.
        options = {"max_grad_norm": limit, "max_steps": 1, "adam_epsilon": 1e-15}
        governed_trainer(governed, tiny_llama(), tmp_path, **options).train()
        return governed.callback().run.machines.contribution.averages

    assert gains(1e-1) == pytest.approx(gains(1e3), rel=1e-3)


def test_gradients_are_clipped_at_trainer_s_limit(tmp_path):
    governed = small(governors=None, hierarchy=None, budget=None)
    options = {"max_grad_norm": 1e-2, "max_steps": 2}
    trainer = governed_trainer(governed, tiny_llama(), tmp_path, **options)
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grads = [p.grad for p in kwargs["model"].parameters()]
            norms.append(torch.nn.utils.get_total_norm(grads).item())

    trainer.add_callback(Norms())
    trainer.train()
    assert norms == pytest.approx([1e-2] * 2, rel=1e-3)


def test_governors_read_gradients_that_are_not_clipped(tmp_path):
    def peaks(limit):
        governed = small(budget=None, hierarchy=None)
        trainer = governed_trainer(
            governed, tiny_llama(), tmp_path, max_grad_norm=limit, max_steps=1
        )
        trainer.train()
        return {n: g.peak for n, g in governed.callback().run.machines.governors.items()}

    assert peaks(1e-3) == peaks(1e3)


def test_a_group_without_a_way_to_the_loss_is_named_before_anything_is_trained(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    before = state_of(model)
    trainer = governed_trainer(small(), model, tmp_path)
    with pytest.raises(ValueError, match=r"none in \[.*'attention_routing'.*head of zeros"):
        trainer.train()
    assert_same(state_of(model), before)


def test_what_was_frozen_by_others_stays_so(tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    governed = small(governors=EAGER, hierarchy=None)
    watched(governed, model, tmp_path)
    assert "embeddings" not in governed.sizes()
    assert not model.model.embed_tokens.weight.requires_grad


def test_bf16_and_accumulation_are_governed_too(tmp_path):
    governed = small(hierarchy=HierarchySettings(patience_fraction=0.5))
    options = {"gradient_accumulation_steps": 2, "bf16": True, "max_steps": 4}
    watch = watched(governed, tiny_llama(), tmp_path, **options)
    assert len(watch.steps) == 4 == governed.report()["steps"]
    assert all(step["moved"] for step in watch.steps)


def test_data_to_iterate_over_are_probed_too(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(RandomText())

    governed = small(governors=EAGER, hierarchy=None)
    trainer = governed_trainer(governed, tiny_llama(), tmp_path)
    trainer.train_dataset = Stream()
    trainer.train()
    assert governed.report()["probes"]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    def trained(name, **options):
        model = tiny_llama(attention_dropout=0.0)
        governed_trainer(small(governors=EAGER), model, tmp_path / name, **options).train()
        return state_of(model)

    assert_same(trained("with", gradient_checkpointing=True), trained("without"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "expected fp16=False"),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            "use_reentrant': False",
        ),
    ],
)
def test_what_cannot_be_governed_is_refused_with_the_way_out(options, message, tmp_path):
    trainer = governed_trainer(small(), tiny_llama(), tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_trainer_s_own_optimiser_is_refused(tmp_path):
    governed = small()
    trainer = plain_trainer(tiny_llama(), tmp_path)
    trainer.add_callback(governed.callback())
    with pytest.raises(ValueError, match=r"optimizers=governed\.optimizers"):
        trainer.train()


def test_gradients_that_are_not_finite_end_the_run_with_a_word(tmp_path):
    model = tiny_llama()
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    trainer = governed_trainer(small(hierarchy=None), model, tmp_path)
    with pytest.raises((FloatingPointError, ValueError), match="output_head"):
        trainer.train()


def test_a_run_whose_groups_have_all_converged_ends(tmp_path):
    model, calls = tiny_llama(), []

    def fade(gradient):
        calls.append(None)
        return gradient * 0.9 ** len(calls)

    for parameter in model.parameters():
        parameter.register_hook(fade)
    governed = small(governors=EAGER, hierarchy=None, budget=None)
    trainer = governed_trainer(governed, model, tmp_path, max_steps=100)
    trainer.train()
    assert trainer.state.global_step < 20
    states = {group["state"] for group in governed.report()["groups"].values()}
    assert states == {"CONVERGED"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"governor": {}},
        {"budget": {"master": 2}},
        {"apply": "all"},
        {"governors": {"ema_decay": "0.9"}},
        {"governors": {"cooling_threshold": float("nan")}},
        {"budget": {"alpha": "much"}},
        {"hierarchy": {"emergency_fraction": True}},
        {"evaluation": {"importance": {"perplexity": "high"}}},
        {"router": {"entropy_coefficient": None}},
    ],
)
def test_settings_that_are_not_there_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        GovernedTraining.from_dict(wrong)


def test_settings_are_read_from_json():
    content = {"governors": {"cooling_window": 3}, "hierarchy": None, "apply": "duty"}
    governed = GovernedTraining.from_dict(content)
    assert governed.governors.cooling_window == 3 and governed.hierarchy is None
    assert governed.budget == BudgetSettings() and governed.apply == "duty"
    assert NEVER.cooling_window == 10**6
