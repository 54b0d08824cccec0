"""An NGT and its twin with what is made for any model: folders, Trainer, peft, compilers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, TrainingArguments

from gravity_hf import (
    GravityTrainer,
    gravity_lora,
    gravity_param_groups,
    gravity_status,
    load_gravity_model,
    patch_with_gravity,
)
from gravity_hf.models.ngt import NGTForCausalLM, NGTModel

from .every_case import any_model
from .ngt_cases import IDS, tiny

CLOSE = {"atol": 3e-6, "rtol": 1e-5}
TWIN = "twin, learned"
# Every parameter that an NGT may have is in one of them.
SAVED = ["v2", "reference", "learned", "log", TWIN, "twin, alibi"]


def gradients(model: NGTForCausalLM) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **quiet, **settings)


@pytest.mark.parametrize("name", SAVED)
def test_folder_comes_back_in_either_class(name: str, tmp_path: Path) -> None:
    model = any_model(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, NGTForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.token_emb.weight.data_ptr()
    assert tied and loaded.config.tie_word_embeddings
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, NGTModel)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_half_precision_leaves_gravity_in_float32(tmp_path: Path) -> None:
    """However a model was made. Once a new one of half precision failed when it was called, as did
    one whose checkpoint lacked some of its weights."""
    lacking, config = tiny(hidden_head_coordinates=False, mass_fading=0.0), tiny().config
    lacking.save_pretrained(tmp_path)
    half = {"dtype": torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **half)
    new = AutoModelForCausalLM.from_config(config, **half)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, **half)
    own = {name for name, x in tiny().bfloat16().named_parameters() if x.dtype == torch.float32}
    for part in ("mass_emb.weight", "gravity.gamma", "coord_proj.weight"):
        assert any(name.endswith(part) for name in own), part
    for model in (loaded, new, grown):
        kinds = {name: x.dtype for name, x in model.named_parameters()}
        single = {name for name, dtype in kinds.items() if dtype == torch.float32}
        assert single == own & kinds.keys() and model(IDS).logits.dtype == torch.bfloat16
    constants = new.model.layers[0].attn.gravity.strength()
    torch.testing.assert_close(constants, torch.full((2,), float(config.initial_strength)))
    # Maps that a checkpoint lacks start as those of a new model.
    for layer in grown.model.layers:
        weight = layer.attn.hidden_coord_proj.weight
        assert torch.equal(weight[:16], weight[2 * 16 :])


@pytest.mark.parametrize("name", ["v2", "reference", TWIN])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    """Dropout included."""
    plain, model = gradients(any_model(name, dropout=0.2)), any_model(name, dropout=0.2)
    model.gradient_checkpointing_enable()
    for weight, gradient in gradients(model).items():
        known = plain[weight]
        assert torch.equal(gradient, known) if known is not None else gradient is None, weight


def test_trainer_takes_a_step_and_decays_no_gravity(tmp_path: Path) -> None:
    model = tiny(dropout=0.0, cutoff="log", coordinate_positions="learned")
    # Of no use in these rows: whatever changes it is decay.
    masses, places = model.model.mass_emb.weight, model.model.coord_emb.weight
    unused = masses.detach()[:3].clone(), places.detach()[20:].clone()
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    settings = arguments(tmp_path, max_steps=2, learning_rate=1e-2, weight_decay=0.5)
    trainer = GravityTrainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    assert torch.equal(masses[:3], unused[0]) and torch.equal(places[20:], unused[1])


def test_gravity_has_a_group_of_its_own() -> None:
    """Constants of heads; masses and places only go without decay, and maps between vectors are
    weights as others are."""
    model = tiny(cutoff="hard", coordinate_positions="learned")
    *_, plain, own = gravity_param_groups(model, 1e-3, gravity_scale=30, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in own["params"]}
    constants = ("gamma", "softening_log", "mass_exponent", "fading", "radius")
    expected = {f"model.layers.{i}.attn.gravity.{name}" for i in (0, 1) for name in constants}
    assert found == expected
    assert own["lr"] == pytest.approx(3e-2) and own["weight_decay"] == 0.0
    undecayed = {names[id(parameter)] for parameter in plain["params"]}
    assert {"model.mass_emb.weight", "model.coord_emb.weight"} <= undecayed
    assert plain["lr"] == pytest.approx(1e-3) and plain["weight_decay"] == 0.0
    assert gravity_param_groups(any_model(TWIN), 1e-3, weight_decay=0.1)[-1]["lr"] == 1e-3


@pytest.mark.parametrize("how", ["peft alone", "gravity_lora"])
def test_peft_trains_gravity_and_brings_it_back(how: str, tmp_path: Path) -> None:
    if how == "peft alone":
        chosen = {"target_modules": ["v_proj", "out_proj"], "modules_to_save": ["gravity"]}
        adapted = get_peft_model(tiny(dropout=0.0), LoraConfig(r=2, **chosen))
    else:
        adapted = gravity_lora(tiny(dropout=0.0), r=2)
    trained = {n: w for n, w in adapted.named_parameters() if w.requires_grad}
    assert any(name.endswith("gamma") for name in dict(adapted.named_parameters()))
    optimizer = torch.optim.SGD(trained.values(), lr=0.3)
    for _ in range(2):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert any("gravity" in name and w.grad.abs().max() > 0 for name, w in trained.items())
    adapted.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    with torch.no_grad():
        logits = adapted(input_ids=IDS).logits
        assert (logits - tiny()(IDS).logits).abs().max() > 1e-3
        assert torch.equal(loaded(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(("name", "backend"), [("v2", "aot_eager"), ("twin, alibi", "eager")])
def test_compiles_into_one_graph(name: str, backend: str) -> None:
    """A training step; its gradients are those of the plain model."""
    plain, model = (any_model(name, dropout=0.0, num_hidden_layers=1) for _ in range(2))
    step = torch.compile(model.train(), backend=backend, fullgraph=True)
    loss = step(IDS, labels=IDS).loss
    loss.backward()
    known = gradients(plain)
    for weight, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, known[weight], atol=1e-5, rtol=1e-4)


def test_status_says_what_an_ngt_is() -> None:
    status = gravity_status(tiny(cutoff="hard"))
    assert status.is_gravity and status.layers == ("model.layers.0.attn", "model.layers.1.attn")
    # Gamma, softening, exponent and fading of two heads, and a radius, in two layers; and the
    # masses.
    assert status.parameters == 2 * (4 * 2 + 1) + 50
    said = str(status)
    for fact in ("law power", "m_j^mu / (d^2 + e)^g", "hard cutoff", "12 coordinates"):
        assert fact in said
    published = str(gravity_status(tiny(preset="reference")))
    assert "m_i m_j (-g / (d^2 + e) + beta)" in published and "repels" in published


def test_status_says_that_a_twin_has_no_gravity(tmp_path: Path) -> None:
    twin = any_model(TWIN)
    status = gravity_status(twin)
    assert not status.is_gravity and status.parameters == 0 and len(status.skipped) == 2
    assert "no gravity" in str(status) and "dot-product twin of an NGT" in str(status)
    for use, kind in ((patch_with_gravity, "twin of an NGT"), (gravity_lora, "takes dot products")):
        with pytest.raises(TypeError, match=kind):
            use(twin)
    twin.save_pretrained(tmp_path)
    loaded: nn.Module = load_gravity_model(tmp_path)
    assert torch.equal(loaded(IDS).logits, twin(IDS).logits)
