"""Repulsion between coordinates: the published numbers, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments, get_cosine_schedule_with_warmup

from gravity_hf.models.ngt import NGTConfig, NGTForCausalLM
from gravity_hf.models.ngt.convert_ngt import convert_reference_state_dict
from gravity_hf.models.ngt.published import our_state
from gravity_hf.training.repulsion import RepulsionTrainer, repulsion_loss

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ngt"
CASES = json.loads((GOLDEN / "repulsion.json").read_text(encoding="utf-8"))
RUNS = json.loads((GOLDEN / "training.json").read_text(encoding="utf-8"))
NAMES = {"min_dist": "min_distance", "alpha": "alpha", "max_samples": "max_samples"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "repulsion.safetensors")


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    return load_file(GOLDEN / "training.safetensors")


def inputs_of(name: str, golden: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    z20, m20 = golden["z20"], golden["m20"]
    if name.startswith("z100"):
        return golden["z100"], golden["m100"]
    return {
        "single_token": (z20[:, :1], None),
        "zeros_nomass": (torch.zeros(2, 8, 3), None),
        "zdup_mass": (golden["zdup"], m20),
        "z20_nomass": (z20, None),
        "z20_2d": (z20[0], None),
        "z20_2d_mass1d": (z20[0], m20[0, :, 0]),
        "z20_mass2d": (z20, m20[..., 0]),
    }.get(name, (z20, m20))


@pytest.mark.parametrize("name", CASES)
def test_published_values_come_out_again(name: str, golden: dict[str, Tensor]) -> None:
    case = CASES[name]
    coordinates, masses = inputs_of(name, golden)
    settings = {NAMES[key]: value for key, value in case.items() if key in NAMES}
    if case["seed"] is not None:
        settings["generator"] = torch.Generator().manual_seed(case["seed"])
    found = repulsion_loss(coordinates, masses, **settings)
    assert found.dim() == 0
    assert found.item() == pytest.approx(case["value"], rel=1e-6)


def test_published_gradients_come_out_again(golden: dict[str, Tensor]) -> None:
    z, m = (golden[name].clone().requires_grad_() for name in ("z20", "m20"))
    repulsion_loss(z, m).backward()
    torch.testing.assert_close(z.grad, golden["grad_z.z20_mass"], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(m.grad, golden["grad_m.z20_mass"], atol=1e-7, rtol=1e-5)


def test_the_generator_alone_decides_which_tokens_are_drawn(golden: dict[str, Tensor]) -> None:
    before = torch.get_rng_state()
    seeds = (1, 1, 2, None, None)
    one, same, other, default, again = (
        repulsion_loss(
            golden["z100"],
            generator=None if seed is None else torch.Generator().manual_seed(seed),
        ).item()
        for seed in seeds
    )
    assert one == same != other and default == again
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("coordinates", "masses", "settings", "message"),
    [
        (torch.zeros(4), None, {}, r"expected \[L, C\] or \[B, L, C\], got \(4,\)"),
        (torch.zeros(2, 4, 3), torch.ones(4, 2), {}, r"of 2 rows of 4 tokens, got \(4, 2\)"),
        (torch.zeros(4, 3), None, {"max_samples": 1}, "expected at least 2, a pair, got 1"),
    ],
    ids=["coordinates", "masses", "samples"],
)
def test_what_does_not_fit_is_refused(
    coordinates: Tensor, masses: Tensor | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        repulsion_loss(coordinates, masses, **settings)


def published_model(run: dict[str, Any], trained: dict[str, Tensor]) -> NGTForCausalLM:
    state = {k.removeprefix("start."): v for k, v in trained.items() if k.startswith("start.")}
    state["head.weight"] = state["token_emb.weight"]
    model = convert_reference_state_dict(state, **run["init_kwargs"])
    # A published hard cutoff gives nothing a gradient; ours does, and fades with its width.
    model.config.cutoff_width = 1e-6
    as_published = NGTForCausalLM(model.config)
    as_published.load_state_dict(model.state_dict())
    for name, parameter in as_published.named_parameters():
        parameter.requires_grad_(not name.endswith("radius"))
    return as_published.train()


def assert_as_published(name: str, model: NGTForCausalLM, trained: dict[str, Tensor]) -> None:
    prefix = f"{name}.end."
    ends = {k.removeprefix(prefix): v for k, v in trained.items() if k.startswith(prefix)}
    state = model.state_dict()
    for ours, value in our_state(ends, model.config).items():
        torch.testing.assert_close(state[ours].view_as(value), value, atol=2e-4, rtol=0, msg=ours)


def next_token_loss(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Published batches have their targets beside them: nothing is shifted."""
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids: Tensor, shifted: bool = False) -> None:
        self.ids, self.shifted = ids.long(), shifted

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        if self.shifted:
            return {"input_ids": ids[:-1], "labels": ids[1:]}
        return {"input_ids": ids, "labels": ids}


class InOrder(RepulsionTrainer):
    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(
    folder: Path, model: nn.Module, data: Rows, steps: int, rows: int, **options: Any
) -> InOrder:
    own = {"gradient_accumulation_steps", "max_grad_norm", "learning_rate"}
    settings = {name: options.pop(name) for name in own & options.keys()}
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": steps,
            "per_device_train_batch_size": rows,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )
    return InOrder(model=model, args=arguments, train_dataset=data, **options)


def test_a_published_run_comes_out_again_step_by_step(
    tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    run = RUNS["default"]
    model = published_model(run, trained)
    trainer = trainer_of(
        tmp_path,
        model,
        Rows(trained["default.data"].flatten(0, 1), shifted=True),
        run["max_steps"],
        rows=2,
        repulsion_weight=run["lambda"],
        detach_masses=False,
        compute_loss_func=next_token_loss,
        optimizers=(torch.optim.AdamW(model.parameters(), lr=3e-3), None),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for found, expected in zip(logs, run["records"], strict=True):
        assert found["repulsion"] == pytest.approx(expected["rep"], abs=2e-4)
        total = expected["task"] + run["lambda"] * expected["rep"]
        assert found["loss"] == pytest.approx(total, abs=2e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], abs=2e-3)
    assert_as_published("default", model, trained)


def test_a_published_run_with_accumulation_and_cosine_comes_out_again(
    trained: dict[str, Tensor],
) -> None:
    """The published way of weighing: on a step's last batch only, divided by their number."""
    run = RUNS["w3_like"]
    model = published_model(run, trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, run["warmup"], run["max_steps"])
    for step, expected in enumerate(run["records"]):
        for batch in range(run["accum"]):
            ids = trained["w3_like.data"][step * run["accum"] + batch].long()
            output = model(ids[:, :-1], output_coordinates=True, use_cache=False)
            loss = next_token_loss(output, ids[:, 1:])
            if batch == run["accum"] - 1:
                loss = loss + run["lambda"] * repulsion_loss(output.coordinates, output.masses)
            (loss / run["accum"]).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), run["grad_clip"])
        assert norm.item() == pytest.approx(expected["grad_norm"], abs=2e-3)
        assert schedule.get_last_lr()[0] == pytest.approx(expected["lr_used"], abs=1e-9)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_as_published("w3_like", model, trained)


def small(**settings: Any) -> NGTForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "coord_dim": 8, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "num_hidden_layers": 1, "dropout": 0.0}
    return NGTForCausalLM(NGTConfig(**{**sizes, **settings}))


IDS = torch.arange(8 * 12).reshape(8, 12) * 7 % 39


def test_the_weight_is_that_of_a_step_whatever_the_accumulation(tmp_path: Path) -> None:
    """Half the batch twice has the gradient of the whole batch once."""
    norms = []
    for rows, accumulation in ((4, 1), (2, 2)):
        trainer = trainer_of(
            tmp_path,
            small(),
            Rows(IDS),
            1,
            rows,
            gradient_accumulation_steps=accumulation,
            repulsion_weight=1000.0,
        )
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    # Without the term it is a hundredth of this.
    assert norms[0] > 10.0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_interval_counts_optimiser_steps(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "repulsion_interval": 2, "repulsion_weight": 1.0}
    trainer = trainer_of(tmp_path, small(), Rows(IDS), 4, 1, **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs if "repulsion" in entry] == [2, 4]


def test_detached_masses_get_no_gradient_from_repulsion(tmp_path: Path) -> None:
    """In one layer the coordinates do not depend on masses, so only the loss could reach them."""
    gradients = []
    for options in ({}, {"detach_masses": True}, {"detach_masses": False}):
        model = small()
        weight = 1.0 if options else 0.0
        trainer = trainer_of(tmp_path, model, Rows(IDS), 1, 4, repulsion_weight=weight, **options)
        batch = {"input_ids": IDS[:4], "labels": IDS[:4]}
        model.train()
        trainer.compute_loss(model, batch).backward()
        gradients.append(model.model.mass_emb.weight.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("twin", {"repulsion_weight": 0.1}, TypeError, "with dot-product attention"),
        ("ngt", {"repulsion_weight": -1.0}, ValueError, "at least 0, got -1.0"),
        ("ngt", {"repulsion_interval": 0}, ValueError, "at least 1 optimiser step, got 0"),
    ],
    ids=["twin", "weight", "interval"],
)
def test_settings_that_cannot_be_are_refused_before_training(
    tmp_path: Path, model: str, options: dict[str, Any], error: type, message: str
) -> None:
    made = small(attention="dot_product") if model == "twin" else small()
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, made, Rows(IDS), 1, 4, **options)
