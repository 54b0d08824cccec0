"""Sparse and dense, saved and loaded, watched: a LeanFormer is one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gravity_hf import LeanFormerForCausalLM, LeanFormerModel, sparsity

from .lean_cases import IDS, OPTIONS, SMALL, TOP_K, logits, padded, tiny

# Attention that chooses, and whose `attention_top_k` may be any number.
CHOOSING = [x for x in OPTIONS if OPTIONS[x].get("screening") != "none"]


@pytest.mark.parametrize("option", CHOOSING)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_as_many_keys_as_tokens_are_dense_to_the_last_bit(option: str, side: str | None) -> None:
    model = tiny(option, attention_top_k=30)
    mask = None if side is None else padded(side).mask
    ids = IDS if side is None else padded(side).ids
    chosen = logits(model, ids, attention_mask=mask)
    with sparsity(model, attention="dense"):
        assert torch.equal(logits(model, ids, attention_mask=mask), chosen)


@pytest.mark.parametrize("option", CHOOSING)
def test_fewer_keys_than_tokens_change_what_comes_after_so_many(option: str) -> None:
    model = tiny(option)
    chosen = logits(model, IDS)
    with sparsity(model, attention="dense"):
        every = logits(model, IDS)
    most = model.config.attention_top_k
    torch.testing.assert_close(chosen[:, :most], every[:, :most], rtol=0, atol=2e-5)
    assert (chosen - every)[:, most:].abs().max() > 1e-3


def test_a_least_length_puts_choosing_off() -> None:
    model = tiny(sparse_min_length=30)
    assert torch.equal(logits(model, IDS), logits(tiny(screening="none"), IDS)) is False
    with sparsity(model, attention="dense"):
        every = logits(model, IDS)
    assert torch.equal(logits(model, IDS), every)


@pytest.mark.parametrize("option", ["single_keys", "blocks", "shared_heads", "gravity", "force"])
@pytest.mark.parametrize("length", [TOP_K, 30])
def test_step_by_step_is_the_fast_way(option: str, length: int) -> None:
    """With the weights of every pair, which are 0 where a key is not looked at."""
    model, given = tiny(option), padded("left", (length, length - 4))
    fast = logits(model, given.ids, attention_mask=given.mask)
    with torch.no_grad():
        seen = model(given.ids, attention_mask=given.mask, output_attentions=True)
    torch.testing.assert_close(seen.logits, fast, rtol=0, atol=2e-5)
    model.set_attn_implementation("eager")
    slow = logits(model, given.ids, attention_mask=given.mask)
    torch.testing.assert_close(slow, fast, rtol=0, atol=2e-5)
    for weights in seen.attentions:
        assert weights.shape == (2, 4, length, length)
        looked_at = (weights > 0).sum(-1)
        assert looked_at.max() == min(TOP_K, length)
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, length))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_folder_comes_back_in_either_class(option: str, tmp_path: Path) -> None:
    model = tiny(option)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LeanFormerForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, LeanFormerModel)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_what_a_checkpoint_lacks_starts_as_in_a_new_model(tmp_path: Path) -> None:
    """Dense attention saved; loaded as gravity with a screening, which it has not."""
    tiny("dense").save_pretrained(tmp_path)
    wanted = {"screening": "learned", "attention": "gravity", "attention_top_k": TOP_K}
    loaded = LeanFormerForCausalLM.from_pretrained(tmp_path, **wanted)
    attention = loaded.model.layers[0].self_attn
    eye = torch.eye(SMALL["screen_dim"]).expand(4, -1, -1)
    torch.testing.assert_close(attention.screening.key.mT @ attention.screening.key, eye)
    assert torch.equal(attention.screening.key, attention.screening.query)
    torch.testing.assert_close(attention.gravity.strength(), torch.full((4,), 3.5))
    assert logits(loaded, IDS).isfinite().all()


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3", "dynamic"])
def test_positions_are_turned_as_transformers_has_it(rope_type: str) -> None:
    parameters = {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
        "llama3": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 32,
        },
    }[rope_type]
    wanted = {"rope_type": rope_type, "rope_theta": 1000.0, **parameters}
    model = tiny(rope_parameters=wanted, attention_top_k=30)
    plain = tiny(rope_theta=1000.0, attention_top_k=30)
    assert plain.config.rope_parameters["rope_theta"] == 1000.0
    same = torch.equal(logits(model, IDS), logits(plain, IDS))
    # Within its length, dynamic frequencies are the plain ones.
    assert same == (rope_type in ("default", "dynamic"))


def test_watching_changes_nothing_and_says_what_choices_keep() -> None:
    model, given = tiny("blocks", feed_forward_policy="masked"), padded("left")
    plain = logits(model, given.ids, attention_mask=given.mask)
    with torch.no_grad():
        seen = model(given.ids, attention_mask=given.mask, output_statistics=True)
    assert torch.equal(seen.logits, plain) and model(IDS).statistics is None
    found = seen.statistics
    assert set(found) == {
        *("attention_recall", "pairs", "pairs_with_screening"),
        *("neurons", "neuron_energy_recall", "block_recall"),
    }
    for name, values in found.items():
        assert values.shape == (3,) and values.dtype == torch.float32, name
        assert ((values > 0.1) & (values <= 1.0)).all() or name == "pairs_with_screening", name
    assert (found["neurons"] == 0.5).all()
    screening = found["pairs_with_screening"] - found["pairs"]
    torch.testing.assert_close(screening, torch.full((3,), 4 / 8 / 3))


@pytest.mark.parametrize("option", ["single_keys", "published"])
def test_every_key_keeps_all_of_attention(option: str) -> None:
    found = tiny(option, attention_top_k=30)(IDS, output_statistics=True).statistics
    torch.testing.assert_close(found["attention_recall"], torch.ones(3))
    assert (found["pairs"] == 1).all()
    fewer = tiny(option)(IDS, output_statistics=True).statistics
    assert (fewer["attention_recall"] < 1).all()
    rows = torch.arange(1, 31).clamp(max=TOP_K).sum() / torch.arange(1, 31).sum()
    torch.testing.assert_close(fewer["pairs"], rows.expand(3))


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="exactly one of"):
        model()
    with pytest.raises(ValueError, match="integers"):
        model(IDS.float())
    with pytest.raises(ValueError, match=r"\[B, T, 32\]"):
        model(inputs_embeds=torch.zeros(1, 4, 8))
    with pytest.raises(TypeError, match="expected attention_mask"):
        model(IDS, atention_mask=torch.ones_like(IDS))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="a LeanFormer has"):
        model(IDS)
