"""Gravity's own parameters of models that are gravity by construction: a group of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from gravity_hf import (
    GravityTrainer,
    LGTConfig,
    LGTForCausalLM,
    NGTConfig,
    NGTForCausalLM,
    TriModel,
    TriModelConfig,
    gravity_param_groups,
)
from gravity_hf.layers.gravitational_attention import MultiHeadGravitationalAttention

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "dim_position": 4,
    "max_position_embeddings": 32,
}
PLACES = ("positions", "curvature_scale")
NGT_CONSTANTS = ("gamma", "softening_log", "mass_exponent", "fading", "radius")


def lgt(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    return LGTForCausalLM(LGTConfig(**SIZES, **settings))


def ngt(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "coord_dim": 6, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    return NGTForCausalLM(NGTConfig(**{**sizes, **more, **settings}))


def names_of(model: nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


GRAVITY = {"G", "mass_proj.weight"}
LGT_NAMES = {f"model.layers.0.attn.gravity.{name}" for name in GRAVITY}


@pytest.mark.parametrize(
    ("model", "expected", "tables"),
    [
        (lgt(), LGT_NAMES, {f"model.pos_embedding.{name}" for name in PLACES}),
        (
            lgt(position_type="fractal"),
            LGT_NAMES,
            {f"model.pos_embedding.{x}" for x in ("scale", "residual", "curvature")},
        ),
        (
            MultiHeadGravitationalAttention(16, num_heads=2),
            {f"heads.{head}.{name}" for head in range(2) for name in GRAVITY},
            set(),
        ),
        (
            TriModel(TriModelConfig(**SIZES)),
            {
                f"{s}_model.layers.0.attn.gravity.{x}"
                for s in ("world", "self", "env")
                for x in GRAVITY
            }
            | {f"fusion.{s}_mass.weight" for s in ("world", "self", "env")}
            | {"fusion.G"},
            {f"{s}_model.pos_embedding.{x}" for s in ("world", "self", "env") for x in PLACES},
        ),
        (
            ngt(cutoff="hard", coordinate_positions="learned"),
            {f"model.layers.0.attn.gravity.{name}" for name in NGT_CONSTANTS},
            {"model.mass_emb.weight", "model.coord_emb.weight"},
        ),
    ],
    ids=["curved", "fractal", "published-module", "tri-model", "ngt"],
)
def test_constants_of_heads_have_a_rate_of_their_own_and_neither_they_nor_tables_decay(
    model: nn.Module, expected: set[str], tables: set[str]
) -> None:
    groups = gravity_param_groups(model, 1e-3, weight_decay=0.1)
    assert names_of(model, groups[-1]) == expected
    undecayed = names_of(model, groups[-2]) if len(groups) == 3 else set()
    assert tables <= undecayed and groups[-2]["lr"] == 1e-3
    # Their values are of the size of weights, so that they learn at the rate of weights.
    assert groups[-1]["lr"] == pytest.approx(1e-3) and groups[-1]["weight_decay"] == 0.0
    assert groups[0]["weight_decay"] == 0.1
    faster = gravity_param_groups(model, 1e-3, gravity_scale=5.0)
    assert faster[-1]["lr"] == pytest.approx(5e-3) and faster[0]["lr"] == 1e-3
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in groups) == trained


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8) + index
        return {"input_ids": ids, "labels": ids}


def test_trainer_neither_decays_gravity_nor_loses_a_parameter(tmp_path: Path) -> None:
    model = lgt()
    # Of no use in these rows: whatever changes it is decay.
    unused = model.model.pos_embedding.positions.detach()[8:].clone()
    embedding = model.model.embed_tokens.weight.detach()[40:].clone()
    arguments = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=1e-2, weight_decay=0.5, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = GravityTrainer(model=model, args=arguments, train_dataset=Rows(), gravity_scale=3.0)
    trainer.train()
    gravity = trainer.optimizer.param_groups[-1]
    assert names_of(model, gravity) == LGT_NAMES
    assert gravity["lr"] == pytest.approx(3e-2) and gravity["weight_decay"] == 0.0
    places = trainer.optimizer.param_groups[-2]
    assert names_of(model, places) == {f"model.pos_embedding.{x}" for x in PLACES}
    assert places["lr"] == pytest.approx(1e-2) and places["weight_decay"] == 0.0
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))
    assert torch.equal(model.model.pos_embedding.positions[8:], unused)
    assert (model.model.embed_tokens.weight[40:].abs() < embedding.abs()).all()


def test_a_checkpoint_of_other_groups_is_refused_in_plain_words(tmp_path: Path) -> None:
    """As one of a version that had places and constants in one group."""
    arguments = TrainingArguments(
        tmp_path, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    GravityTrainer(model=lgt(), args=arguments, train_dataset=Rows()).train()
    folder = tmp_path / "checkpoint-1"
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    constants = state["param_groups"].pop()
    state["param_groups"][-1]["params"] += constants["params"]
    torch.save(state, folder / "optimizer.pt")
    trainer = GravityTrainer(model=lgt(), args=arguments, train_dataset=Rows())
    with pytest.raises(ValueError, match=r"checkpoint-1: expected the optimiser's groups.*version"):
        trainer.train(resume_from_checkpoint=str(folder))
