"""Training an LGT with what trains other models: Trainer, peft, checkpointing; and its growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from gravity_hf.models.lgt import (
    LGTForCausalLM,
    LGTForSequenceClassification,
    LGTForTokenClassification,
    LGTModel,
)

from .lgt_cases import IDS, OPTIONS, padded, tiny

CLOSE = {"atol": 3e-6, "rtol": 1e-5}


def gradients(model: LGTForCausalLM) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_learns(option: str) -> None:
    """The published law is the exception: its attention is the identity at new positions."""
    for name, gradient in gradients(tiny(**OPTIONS[option])).items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert option == "published" or gradient.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """Dropout included."""
    plain, model = gradients(tiny(dropout=0.2)), tiny(dropout=0.2)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected use_reentrant=False"):
        tiny().gradient_checkpointing_enable({"use_reentrant": True})


def test_trainer_trains_saves_and_loads(tmp_path: Path) -> None:
    model = tiny(dropout=0.0)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.1
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, LGTForCausalLM)
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("how", ["adapters on masses", "gravity saved whole"])
def test_peft_trains_gravity_and_brings_it_back(how: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["out_proj", "fc1", "fc2"], "r": 2}
    if how == "adapters on masses":
        settings["target_modules"].append("mass_proj")
    else:
        settings["modules_to_save"] = ["gravity"]
    adapted = get_peft_model(tiny(dropout=0.0), LoraConfig(**settings))
    trained = {n: w for n, w in adapted.named_parameters() if w.requires_grad}
    assert any("gravity" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(weight.grad is not None for weight in trained.values())
    adapted.eval().save_pretrained(tmp_path)
    logits = adapted(input_ids=IDS).logits
    assert (logits - tiny()(IDS).logits).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits, **CLOSE)


def test_eval_table_follows_adapters() -> None:
    """Positions that an adapter replaces: switched off and on, exchanged, merged, taken away."""
    base = tiny()
    plain = base(IDS).logits
    settings = LoraConfig(target_modules=["out_proj"], modules_to_save=["pos_embedding"], r=2)
    adapted = get_peft_model(base, settings).eval()
    adapted.add_adapter("other", settings)
    for index, name in enumerate(("default", "other")):
        copies = base.model.pos_embedding.modules_to_save[name]
        copies.positions.data.mul_(2.0 + index)
    with torch.no_grad():
        seen = []
        for name in ("default", "other", "default"):
            adapted.set_adapter(name)
            seen.append(adapted(input_ids=IDS).logits)
            with adapted.disable_adapter():
                torch.testing.assert_close(adapted(input_ids=IDS).logits, plain, **CLOSE)
        assert torch.equal(seen[0], seen[2])
        assert min((x - y).abs().max() for x, y in ((*seen[:2],), (seen[0], plain))) > 1e-3
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, seen[0], **CLOSE)


def test_names_that_nobody_reads() -> None:
    """Token types come from tokenizers; a misspelt name is an error."""
    for kind in (LGTForSequenceClassification, LGTForTokenClassification, LGTForCausalLM):
        model, types = tiny(kind), torch.zeros_like(IDS)
        assert torch.equal(model(IDS, token_type_ids=types).logits, model(IDS).logits)
        with pytest.raises(TypeError, match="atention_mask"):
            model(IDS, atention_mask=types)


@pytest.mark.parametrize("causal", [True, False])
def test_sequence_classes_do_not_depend_on_padding(causal: bool) -> None:
    model = tiny(LGTForSequenceClassification, is_causal=causal, num_labels=3)
    plain = model(IDS).logits
    for side in ("left", "right"):
        torch.testing.assert_close(model(**padded(side)).logits, plain, **CLOSE)
        # Without a mask, the padding token says it.
        torch.testing.assert_close(model(padded(side)["input_ids"]).logits, plain, **CLOSE)
    other = IDS.clone()
    other[:, 1] = 4
    assert (model(other).logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (torch.tensor([0, 2]), "single_label_classification"),
        (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), "multi_label_classification"),
        (torch.tensor([[0.3, 1.0, -2.0], [1.0, 0.5, 0.0]]), "regression"),
    ],
)
def test_sequence_losses_by_problem(labels: Tensor, problem: str) -> None:
    model = tiny(LGTForSequenceClassification, num_labels=3, problem_type=problem)
    output = model(IDS, labels=labels)
    functional = torch.nn.functional
    expected = {
        "single_label_classification": functional.cross_entropy,
        "multi_label_classification": functional.binary_cross_entropy_with_logits,
        "regression": functional.mse_loss,
    }[problem]
    torch.testing.assert_close(output.loss, expected(output.logits, labels))


def test_token_classes() -> None:
    model = tiny(LGTForTokenClassification, num_labels=3)
    labels = (IDS % 3).masked_fill(IDS > 40, -100)
    output = model(IDS, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    ("auto", "model_class"),
    [
        (AutoModelForSequenceClassification, LGTForSequenceClassification),
        (AutoModelForTokenClassification, LGTForTokenClassification),
    ],
)
def test_classifiers_load_by_auto_class(auto: Any, model_class: type, tmp_path: Path) -> None:
    model = tiny(model_class, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_can_grow(tied: bool, tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=tied)
    before = model(IDS).logits
    model.resize_token_embeddings(60, mean_resizing=False)
    torch.testing.assert_close(model(IDS).logits[..., :50], before, **CLOSE)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("model_class", [LGTForCausalLM, LGTModel])
def test_new_layer_changes_nothing_and_learns(layers: int, model_class: type) -> None:
    model = tiny(model_class, num_hidden_layers=layers, dropout=0.0)
    with torch.no_grad():
        for layer in model.base_model.layers:
            layer.norm2.weight.uniform_(0.5, 2.0)
            layer.norm2.bias.normal_()
        before = model(IDS)[0]
        block = model.add_layer()
        # Each further norm shrinks by 5e-6 of itself: LayerNorm's eps beside a variance of 1.
        torch.testing.assert_close(model(IDS)[0], before, rtol=2e-5, atol=2e-5)
    assert model.config.num_hidden_layers == layers + 1 == len(model.base_model.layers)
    assert block is model.base_model.layers[-1] and not block.training
    torch.testing.assert_close(
        block.attn.gravity.G.detach(), torch.tensor([0.9**layers, 0.9 ** (layers + 1)])
    )

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    target = torch.linspace(-1, 1, before.numel()).view_as(before)
    for step in range(2):
        optimizer.zero_grad()
        (model.train()(IDS)[0] * target).sum().backward()
        moving = {"attn.out_proj.weight", "fc2.weight"} if step == 0 else None
        for name, weight in block.named_parameters():
            assert (moving is not None and name not in moving) or weight.grad.abs().max() > 0, name
        optimizer.step()


def test_grown_model_saves_generates_and_keeps_its_precision(tmp_path: Path) -> None:
    model = tiny().bfloat16()
    model.add_layer()
    kinds = {(n.split(".")[-2], w.dtype) for n, w in model.model.layers[2].named_parameters()}
    assert ("gravity", torch.float32) in kinds and ("fc1", torch.bfloat16) in kinds
    model.save_pretrained(tmp_path)
    loaded = LGTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] > 9


def test_a_new_model_of_half_precision_has_its_gravity_in_float32() -> None:
    """Once its positions and masses were rounded, which those of a loaded one are not."""
    config = tiny(G_layer_decay=0.9).config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    own = {name for name, x in tiny().bfloat16().named_parameters() if x.dtype == torch.float32}
    new = {name for name, x in model.named_parameters() if x.dtype == torch.float32}
    assert new == own and any(name.endswith("mass_proj.weight") for name in new)
    gravity = model.model.layers[1].attn.gravity
    assert gravity.G.tolist() == gravity.initial_constants(config).tolist()


def test_curvature_is_set_at_once_and_checked() -> None:
    model = tiny()
    before = model(IDS).logits
    model.curvature = 0.9
    assert model.config.curvature == 0.9 == model.model.curvature
    assert (model(IDS).logits - before).abs().max() > 1e-6
    with pytest.raises(ValueError, match="curvature: expected a finite number, got nan"):
        model.curvature = float("nan")
    model.curvature = 0.15
    assert torch.equal(model(IDS).logits, before)
