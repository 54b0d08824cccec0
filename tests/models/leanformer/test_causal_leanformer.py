"""What a LeanFormer learns, and what trains it: every loss, Trainer, peft, compilers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from gravity_hf import LeanFormerForCausalLM

from .lean_cases import IDS, OPTIONS, TOP_K, logits, tiny

OTHER = {"screening_weight": 0.0, "gate_weight": 0.0, "exit_weight": 0.0}


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> None:
    """A function is compiled so many times only, over all tests together."""
    torch.compiler.reset()


def gradients(model: LeanFormerForCausalLM) -> dict[str, Tensor | None]:
    torch.manual_seed(3)
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_learns(option: str) -> None:
    for name, gradient in gradients(tiny(option)).items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("option", ["blocks", "gravity", "published"])
def test_what_is_learned_beside_text_moves_nothing_but_what_it_is_for(option: str) -> None:
    alone = gradients(tiny(option, **OTHER))
    for name, gradient in gradients(tiny(option)).items():
        own = any(part in name for part in ("screen", "predictor", "exit_head"))
        assert own or torch.equal(gradient, alone[name]), name


def test_the_loss_is_the_weighted_sum_in_training_and_the_text_alone_otherwise() -> None:
    model = tiny(screening_weight=0.3, gate_weight=0.2, exit_weight=0.1)
    torch.manual_seed(0)
    out = model.train()(IDS, labels=IDS)
    total = 0.3 * out.screening_loss + 0.2 * out.gate_loss + 0.1 * out.exit_loss
    torch.testing.assert_close(out.aux_loss, total)
    torch.testing.assert_close(out.loss, out.lm_loss + out.aux_loss)
    assert model(IDS).loss is None
    still = model.eval()(IDS, labels=IDS)
    expected = torch.nn.functional.cross_entropy(
        logits(model, IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    )
    torch.testing.assert_close(still.loss, expected)
    assert still.aux_loss is None and torch.equal(still.loss, still.lm_loss)


def test_labels_that_are_left_out_count_nowhere() -> None:
    model, labels = tiny().train(), IDS.clone()
    labels[:, 15:] = -100
    other = IDS.clone()
    other[:, 16:] = 3
    found = []
    for ids in (IDS, other):
        torch.manual_seed(0)
        out = model(ids, labels=labels)
        found.append((out.lm_loss, out.exit_loss))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_losses_of_parts_of_a_batch_add_up_to_that_of_the_whole() -> None:
    """With `num_items_in_batch`, as a trainer that gathers gradients has it."""
    model = tiny(screening_rows=30).train()
    whole = model(IDS, labels=IDS)
    items = torch.tensor(IDS[:, 1:].numel())
    parts = [model(row, labels=row, num_items_in_batch=items) for row in IDS.split(1)]
    torch.testing.assert_close(sum(x.lm_loss for x in parts), whole.lm_loss)
    torch.testing.assert_close(sum(x.aux_loss for x in parts), whole.aux_loss)


@pytest.mark.parametrize("option", ["blocks", "gravity", "masked", "published"])
def test_gradient_checkpointing_changes_no_gradient(option: str) -> None:
    """Dropout and the sample of queries included."""
    plain, model = gradients(tiny(option, dropout=0.2)), tiny(option, dropout=0.2)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("option", ["dense", "masked", "gravity"])
def test_compiles_into_one_graph(option: str) -> None:
    model = tiny(option, num_hidden_layers=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(found, logits(model, IDS), rtol=0, atol=1e-5)


def test_a_graph_of_any_length_is_compiled() -> None:
    model = tiny("blocks", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (30, 20, TOP_K - 2):
            found = compiled(IDS[:, :length], use_cache=False).logits
            torch.testing.assert_close(found, logits(model, IDS[:, :length]), rtol=0, atol=1e-5)


def test_a_training_step_compiles_into_one_graph() -> None:
    """Its gradients are those of the plain model, where both look at all queries."""
    settings = {"num_hidden_layers": 2, "screening_rows": 30}
    known, model = gradients(tiny("masked", **settings)), tiny("masked", **settings)
    step = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    step(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, known[name], atol=1e-5, rtol=1e-4)


def test_trainer_trains_and_resumes(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    quiet: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "seed": 1, **quiet}
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    trainer = Trainer(model=tiny(), args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3
    again = Trainer(model=tiny(), args=arguments, train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize("option", ["single_keys", "skipped"])
def test_peft_trains_the_factors_and_brings_them_back(option: str, tmp_path: Path) -> None:
    names = ["q_proj", "v_proj", "down_proj"]
    if option == "single_keys":
        names = [f"{name}.up" for name in names]
    adapted = get_peft_model(tiny(option), LoraConfig(r=2, target_modules=names))
    optimizer = torch.optim.SGD([x for x in adapted.parameters() if x.requires_grad], lr=1.0)
    for _ in range(2):
        adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = adapted.eval()(input_ids=IDS).logits
    assert (trained - logits(tiny(option), IDS)).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(option), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, trained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["tied", "untied", "low_rank"])
def test_a_vocabulary_grows_and_shrinks(kind: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tie_word_embeddings": kind == "tied"}
    model = tiny(head_rank=4 if kind == "low_rank" else 0, **settings)
    before = logits(model, IDS)
    model.resize_token_embeddings(60)
    assert torch.equal(logits(model, IDS)[..., :50], before) and model.config.vocab_size == 60
    assert logits(model, torch.full((1, 3), 59)).shape == (1, 3, 60)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind == "tied")
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(LeanFormerForCausalLM.from_pretrained(tmp_path), IDS), logits(model, IDS)
    )
    model.resize_token_embeddings(50)
    assert torch.equal(logits(model, IDS), before)
