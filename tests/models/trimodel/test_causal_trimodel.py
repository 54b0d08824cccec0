"""The language model of the world: what reaches a logit, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.trimodel.tri_cases import VOCABULARY, language_ids, tiny_language_model, tokens
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import gravity_hf  # noqa: F401  (registers the model types)
from gravity_hf.models.trimodel import TriModelForCausalLM


def test_later_tokens_never_change_earlier_logits_and_contexts_do() -> None:
    model, inputs = tiny_language_model(), tokens()
    before = model(**language_ids(inputs)).logits
    later = {**inputs, "world": inputs["world"].clone()}
    later["world"][:, 4:] = (later["world"][:, 4:] + 1) % VOCABULARY
    after = model(**language_ids(later)).logits
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])
    for name in ("self", "env"):
        other = {**inputs, name: (inputs[name] + 1) % VOCABULARY}
        change = (model(**language_ids(other)).logits - before).abs().amax((0, 2))
        assert (change > 1e-6).all(), f"{name} reaches every token"
    # Earlier tokens of the world do reach later ones.
    earlier = {**inputs, "world": inputs["world"].clone()}
    earlier["world"][:, 0] = (earlier["world"][:, 0] + 1) % VOCABULARY
    assert (model(**language_ids(earlier)).logits - before)[:, 1:].abs().max() > 1e-6


def test_generation_with_a_cache_is_the_one_without() -> None:
    model, inputs = tiny_language_model(), language_ids(tokens())
    masks = {"attention_mask": torch.ones(2, 7, dtype=torch.long)}
    masks["attention_mask"][0, :2] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (
        model.generate(**inputs, **masks, **settings, use_cache=use) for use in (True, False)
    )
    assert with_cache.shape == (2, 13)
    assert torch.equal(with_cache, without)
    fixed = {"cache_implementation": "static", "prefill_chunk_size": 4}
    assert torch.equal(model.generate(**inputs, **masks, **settings, **fixed), without)
    # One step alone, so that equal argmaxes hide nothing.
    full = model(**inputs, use_cache=False).logits
    first = model(**{**inputs, "input_ids": inputs["input_ids"][:, :6]}, use_cache=True)
    cache = first["cache" if "cache" in first else "past_key_values"]
    step = {**inputs, "input_ids": inputs["input_ids"][:, 6:]}
    last = model(**step, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(last[:, 0], full[:, 6], rtol=0, atol=1e-5)


def test_loss_is_that_of_the_next_token_and_left_padding_changes_nothing() -> None:
    model, inputs = tiny_language_model(), language_ids(tokens())
    ids = inputs["input_ids"]
    output = model(**inputs, labels=ids)
    flat = output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    torch.testing.assert_close(output.loss, F.cross_entropy(*flat))
    padded = {**inputs, "input_ids": F.pad(ids, (3, 0))}
    mask = F.pad(torch.ones_like(ids), (3, 0))
    # The first token is not asked for, as without padding.
    labels = F.pad(ids[:, 1:], (4, 0), value=-100)
    found = model(**padded, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.logits[:, 3:], output.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, output.loss, rtol=0, atol=1e-5)
    kept = model(**inputs, logits_to_keep=2).logits
    torch.testing.assert_close(kept, output.logits[:, -2:])


@pytest.mark.parametrize("tied", [False, True])
def test_auto_classes_load_the_language_model_and_the_model_inside(
    tied: bool, tmp_path: Path
) -> None:
    model, inputs = tiny_language_model(tie_word_embeddings=tied), language_ids(tokens())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    shared = again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert shared is tied
    inside = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(inside.fusion.gate.weight, model.model.fusion.gate.weight)


class _Echoes(torch.utils.data.Dataset):
    """The world goes on with the token that stands in env; nothing else is asked for."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        token = index % VOCABULARY
        world = torch.tensor([0, 1, token])
        ids = {"self_input_ids": torch.tensor([2, 3, 4]), "input_ids": world}
        labels = torch.tensor([-100, -100, token])
        return {**ids, "env_input_ids": torch.tensor([5, token]), "labels": labels}


def test_trainer_trains_it_and_every_trainable_weight_learns(tmp_path: Path) -> None:
    model = tiny_language_model()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=50,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        weight_decay=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=_Echoes(), eval_dataset=_Echoes())
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * first
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name]) is not x.requires_grad, name


@pytest.mark.parametrize("given", [{"is_causal": False}, {"use_gate": False}, {"vocab_size": None}])
def test_settings_under_which_it_would_not_be_a_language_model_are_refused(
    given: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match="is_causal=True"):
        tiny_language_model(**given)


def test_a_world_that_is_not_causal_is_refused() -> None:
    with pytest.raises(ValueError, match="also of the world"):
        tiny_language_model(streams={"world": {"is_causal": False}})


def test_contexts_may_be_bidirectional() -> None:
    model = tiny_language_model(streams={"env": {"is_causal": False}})
    assert isinstance(model, TriModelForCausalLM)
    inputs = tokens()
    before = model(**language_ids(inputs)).logits
    other = {**inputs, "world": inputs["world"].clone()}
    other["world"][:, -1] = (other["world"][:, -1] + 1) % VOCABULARY
    assert torch.equal(model(**language_ids(other)).logits[:, :-1], before[:, :-1])
