"""Settings and projections survive saving; a plain load is the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hosts import logits, tiny_host
from integration.sparse_cases import BUDGET, inputs_of, sparse_host
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from gravity_hf import densify_attention, sparsify_attention
from gravity_hf.integration.sparse_settings import sparse_modules


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with random projections, its logits, and its folder."""
    torch.manual_seed(0)
    model = sparse_host("qwen2", screening="learned", screen_dim=4)
    folder = tmp_path_factory.mktemp("sparse")
    model.save_pretrained(folder)
    return model, logits(model, inputs_of()), folder


def test_one_call_brings_settings_and_projections_back(saved):
    _, expected, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(logits(sparsify_attention(again), inputs_of()), expected)


def test_shards_are_read_too(saved, tmp_path):
    model, expected, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = sparsify_attention(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(again, inputs_of()), expected)


def test_a_plain_load_is_the_host(saved):
    _, _, folder = saved
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain) is Qwen2ForCausalLM and not sparse_modules(plain)
    assert torch.equal(logits(plain, inputs_of()), logits(tiny_host("qwen2"), inputs_of()))


def test_a_checkpoint_without_its_projections_is_refused(saved, tmp_path):
    _, _, folder = saved
    host = tiny_host("qwen2")
    host.save_pretrained(tmp_path)
    Path(tmp_path, "config.json").write_text(Path(folder, "config.json").read_text())
    with pytest.raises(ValueError, match="3 are missing"):
        sparsify_attention(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_learned_projections_are_not_left_out_without_a_word(saved):
    _, _, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sparse_topk")
    with pytest.raises(ValueError, match=r"Call sparsify_attention\(model\)"):
        logits(model, inputs_of())


def test_a_gravity_model_comes_back_sparse(tmp_path):
    model = sparse_host("power")
    expected = logits(model, inputs_of())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.model_type == "gravity_qwen2"
    assert torch.equal(logits(sparsify_attention(again), inputs_of()), expected)


def test_a_dense_model_is_saved_without_a_trace(tmp_path):
    densify_attention(sparse_host("qwen2", BUDGET)).save_pretrained(tmp_path)
    assert "sparse_attention" not in json.loads(Path(tmp_path, "config.json").read_text())
