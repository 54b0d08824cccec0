"""The Bekenstein term: the published values, a floor, and its place in a Trainer's loss."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import tiny_host
from training.lgt_cases import (
    LENGTH,
    VOCABULARY,
    RandomText,
    assert_same,
    golden_numbers,
    golden_tensors,
    state_of,
    tiny_lgt,
    trainer_of,
)
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import BaseModelOutput

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.training.bekenstein import (
    BekensteinTrainer,
    bekenstein_penalty,
    charged_states,
)
from gravity_hf.training.containment import (
    ContainmentCallback,
    ContainmentConfig,
    ContainmentProtocol,
)

# What leaves a norm of width 16 with gains of 1 has a variance of 16 / 15.
WIDE = 0.5 * math.log(2 * math.pi * math.e * 16 / 15)


def test_without_a_floor_it_is_the_published_term():
    case, x = golden_numbers("bekenstein"), golden_tensors("bekenstein")["in/x"]
    protocol = ContainmentProtocol(ContainmentConfig(), tiny_lgt())
    assert protocol.bekenstein_penalty(x).item() == pytest.approx(case["value"], rel=1e-6)
    constant = protocol.bekenstein_penalty(torch.ones(2, 3, 16)).item()
    assert constant == pytest.approx(case["constant_input_value"], rel=1e-6)


def test_with_a_floor_it_is_never_negative_and_pushes_no_further_down():
    narrow = (0.01 * torch.randn(4, 5, 16)).requires_grad_()
    term = bekenstein_penalty(narrow)
    term.backward()
    assert term.item() == 0.0
    assert narrow.grad.abs().max() == 0.0
    wide = torch.randn(4, 5, 16).requires_grad_()
    bekenstein_penalty(wide).backward()
    # A step against the gradient makes vectors narrower.
    assert ((wide - wide.mean(-1, keepdim=True)) * wide.grad).sum() > 0


def test_padding_is_not_charged():
    hidden = torch.randn(2, 4, 16)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    padded = torch.where(mask.bool()[..., None], hidden, 1e3 * hidden)
    torch.testing.assert_close(
        bekenstein_penalty(padded, mask=mask), bekenstein_penalty(hidden[mask.bool()])
    )


@pytest.mark.parametrize(
    ("hidden", "options", "message"),
    [
        (torch.ones(3, 1), {}, "width of at least 2"),
        (torch.ones(2, 3, 4), {"mask": torch.ones(3)}, "mask"),
    ],
)
def test_what_has_no_variance_is_refused(hidden, options, message):
    with pytest.raises(ValueError, match=message):
        bekenstein_penalty(hidden, **options)


def test_each_layer_is_charged_and_the_embeddings_are_not():
    mask, layers = torch.ones(1, 2), (torch.ones(1, 2, 4), torch.zeros(1, 2, 4))
    ((hidden, told),) = charged_states(
        BaseModelOutput(hidden_states=layers), {"attention_mask": mask}
    )
    assert hidden is layers[1] and told is mask


class Texts(RandomText):
    def __getitem__(self, index):
        ids = self.ids[index]
        mask = torch.ones_like(ids).index_fill_(0, torch.arange(4), 0)
        streams = {f"{name}_input_ids": ids for name in ("world", "self", "env")}
        return {**streams, "world_attention_mask": mask, "labels": ids}


def test_a_tri_model_is_charged_on_its_streams_and_damped_in_all_of_them(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "lgt_tri", vocab_size=VOCABULARY, output_dim=VOCABULARY, dim_position=8,
        max_position_embeddings=LENGTH, **sizes,
    )  # fmt: skip
    model = AutoModel.from_config(config)
    before = {name: p.clone() for name, p in model.named_parameters() if name.endswith("G")}
    assert len(before) == 4
    trainer = trainer_of(
        model, tmp_path, ContainmentCallback({"max_attention_force": 1e-6}), kind=BekensteinTrainer,
        extra={"bekenstein_weight": 0.5, "train_dataset": Texts()}, max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "bekenstein")[0] == pytest.approx(0.5 * WIDE, rel=1e-3)
    for name, tensor in before.items():
        torch.testing.assert_close(model.get_parameter(name), 0.9 * tensor)


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def test_the_trainers_loss_has_the_term_and_its_evaluation_has_not(tmp_path):
    def trained(weight):
        model = tiny_lgt()
        evaluating = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
        trainer = trainer_of(
            model, tmp_path, kind=BekensteinTrainer, extra={"bekenstein_weight": weight},
            learning_rate=0.0, **evaluating,
        )  # fmt: skip
        trainer.train()
        return trainer

    off, on = trained(0.0), trained(0.5)
    (term,) = logged(on, "bekenstein")
    assert term == pytest.approx(0.5 * WIDE, rel=1e-3)
    assert logged(on, "loss")[0] == pytest.approx(logged(off, "loss")[0] + term, rel=1e-5)
    assert logged(on, "eval_loss") == logged(off, "eval_loss")


def test_accumulated_batches_are_charged_as_one_large_batch(tmp_path):
    def trained(**batches):
        model = tiny_lgt(dropout=0.0)
        trainer_of(
            model, tmp_path, kind=BekensteinTrainer, extra={"bekenstein_weight": 0.5}, max_steps=2,
            optim="sgd", learning_rate=0.1, max_grad_norm=0, **batches,
        ).train()  # fmt: skip
        return state_of(model)

    large = trained(per_device_train_batch_size=8)
    small = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_patched_host_is_charged_too(tmp_path):
    host = patch_with_gravity(tiny_host("qwen2"), GravityConfig())
    trainer = trainer_of(host, tmp_path, kind=BekensteinTrainer, max_steps=1)
    trainer.train()
    assert logged(trainer, "bekenstein")[0] >= 0


def test_a_weight_of_zero_trains_as_without(tmp_path):
    def trained(**options):
        model = tiny_lgt()
        trainer_of(model, tmp_path, max_steps=2, **options).train()
        return state_of(model)

    charged = trained(kind=BekensteinTrainer, extra={"bekenstein_weight": 0.0})
    assert_same(charged, trained())
