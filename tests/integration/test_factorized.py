"""Linear maps of hosts in two factors: in place, on disk, refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import VOCABULARY, logits, tiny_host, tiny_inputs
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gravity_hf import (
    GravityConfig,
    factorize,
    load_factorized,
    load_gravity_model,
    patch_with_gravity,
    save_factorized,
    sparsify_attention,
    sparsify_feed_forward,
    sparsity,
    unpatch_gravity,
)
from gravity_hf.integration.activation_statistics import input_second_moments
from gravity_hf.layers.low_rank import LowRankLinear
from gravity_hf.training.any_model import load_any_model

KINDS = ["llama", "qwen2", "gpt2", "bert", "vit", "one module called by all layers"]
KINDS += ["cross attention", "linear attention between"]


def batches(name: str = "llama") -> list[dict[str, Any]]:
    return [tiny_inputs(name, batch=4, length=24, seed=seed) for seed in (2, 3)]


@pytest.mark.parametrize("name", KINDS)
def test_a_factorised_host_is_smaller_and_is_the_same_after_saving(
    name: str, tmp_path: Path
) -> None:
    host, inputs = tiny_host(name), tiny_inputs(name)
    size = sum(p.numel() for p in host.parameters())
    report = factorize(host, 0.7, calibration=batches(name))
    assert report.parameters_after == sum(p.numel() for p in host.parameters()) < size
    assert report.parameters_before == size
    assert report.ranks == {
        n: m.rank for n, m in host.named_modules() if isinstance(m, LowRankLinear)
    }
    save_factorized(host, tmp_path)
    again = load_factorized(tmp_path)
    assert type(again) is type(host) and not again.training
    assert torch.equal(logits(again, inputs), logits(host, inputs))


def test_biases_stay_as_they_are() -> None:
    host = tiny_host("qwen2")
    bias = host.model.layers[1].self_attn.k_proj.bias
    torch.nn.init.normal_(bias)
    before = bias.clone()
    factorize(host, 0.5)
    assert torch.equal(host.model.layers[1].self_attn.k_proj.bias, before)


def test_what_is_frozen_or_in_training_stays_so() -> None:
    host = tiny_host("llama").train()
    host.model.layers[0].requires_grad_(False)
    factorize(host, 0.5)
    assert all(module.training for module in host.modules())
    for name, parameter in host.named_parameters():
        assert parameter.requires_grad == (not name.startswith("model.layers.0."))


def test_ranks_of_one_host_are_given_to_another_by_name() -> None:
    first = factorize(tiny_host("llama"), 0.5, calibration=batches())
    second = factorize(tiny_host("llama"), first.ranks)
    assert second.ranks == first.ranks
    one = {"model.layers.1.mlp.up_proj": 3}
    assert factorize(tiny_host("llama"), one).ranks == one
    with pytest.raises(ValueError, match=r"rank: expected names of maps.*got \['up_proj'\]"):
        factorize(tiny_host("llama"), {"up_proj": 3})


def test_the_report_accounts_for_every_map_and_parameter() -> None:
    host = tiny_host("llama")
    report = factorize(host, "energy:0.9", calibration=batches(), skip=("lm_head", "v_proj"))
    assert set(report.skipped) == {
        "lm_head",
        *(f"model.layers.{i}.self_attn.v_proj" for i in (0, 1, 2)),
    }
    summary = report.summary()
    change = summary["maps_parameters_before"] - summary["maps_parameters_after"]
    assert change == report.parameters_before - report.parameters_after > 0
    assert summary["maps_flops_per_token_after"] == 2 * summary["maps_parameters_after"]
    for row in report.maps:
        assert row.energy >= 0.9 and (row.rank is None) == bool(row.note)
    assert "model.layers.2.mlp.down_proj" in str(report)
    assert "as asked (skip)" in report.to_json()


def test_calibrated_factors_change_the_outputs_less_than_plain_ones() -> None:
    host = tiny_host("llama")
    narrow = [{"input_ids": x["input_ids"] % 5 + 3} for x in batches()]
    inputs = {"input_ids": tiny_inputs("llama", seed=7)["input_ids"] % 5 + 3}
    wanted, errors = logits(host, inputs), {}
    for name, shown in (("plain", None), ("calibrated", narrow)):
        low = copy.deepcopy(host)
        factorize(low, 0.5, calibration=shown)
        errors[name] = (logits(low, inputs) - wanted).square().mean()
    assert errors["calibrated"] < 0.5 * errors["plain"]


def test_at_a_rank_that_saves_nothing_nothing_changes() -> None:
    host, inputs = tiny_host("gpt2"), tiny_inputs("gpt2")
    before, keys = logits(host, inputs), set(host.state_dict())
    report = factorize(host, "energy:1.0", calibration=batches())
    assert not report.ranks and set(host.state_dict()) == keys
    assert torch.equal(logits(host, inputs), before)
    with pytest.raises(ValueError, match="with dense maps. Save it with save_pretrained"):
        save_factorized(host, "nowhere")


def test_padding_teaches_nothing() -> None:
    host, ids = tiny_host("llama").double(), tiny_inputs("llama", batch=1)["input_ids"]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids)], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1),
    }
    alone, beside = (input_second_moments(host, names, [x]) for x in ({"input_ids": ids}, padded))
    for name in names:
        torch.testing.assert_close(alone[name], beside[name], rtol=1e-6, atol=1e-9)


def test_padding_of_a_decoder_is_its_own() -> None:
    host, inputs = tiny_host("cross attention"), tiny_inputs("cross attention", batch=1)
    inputs["decoder_attention_mask"] = torch.ones(1, 11, dtype=torch.long)
    inputs["decoder_attention_mask"][:, 8:] = 0
    tokens = {
        "model.encoder.layers.0.fc1": 11,
        "model.decoder.layers.0.fc1": 8,
        "model.decoder.layers.0.encoder_attn.q_proj": 8,
        "model.decoder.layers.0.encoder_attn.k_proj": 11,
    }
    moments = input_second_moments(host, tokens, [inputs])
    assert {name: moments.tokens(name) for name in tokens} == tokens


@pytest.mark.parametrize("load", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("gravity", [False, True])
def test_transformers_alone_refuses_the_folder_and_says_what_loads_it(
    load: Any, gravity: bool, tmp_path: Path
) -> None:
    host = tiny_host("llama")
    if gravity:
        patch_with_gravity(host)
    factorize(host, 0.5)
    host.save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"gravity_hf\.load_factorized"):
        load.from_pretrained(tmp_path)


@pytest.mark.parametrize("first", ["gravity", "factors"])
def test_it_goes_with_gravity_in_either_order(first: str, tmp_path: Path) -> None:
    host, inputs = tiny_host("llama"), tiny_inputs("llama")
    steps = [
        lambda: patch_with_gravity(host, GravityConfig(law="power")),
        lambda: factorize(host, 0.6),
    ]
    for step in steps if first == "gravity" else reversed(steps):
        step()
    host.save_pretrained(tmp_path)
    again = load_factorized(tmp_path)
    assert torch.equal(logits(again, inputs), logits(host, inputs))
    assert torch.equal(logits(load_gravity_model(tmp_path), inputs), logits(host, inputs))
    config = pickle.loads(pickle.dumps(host.config))  # noqa: S301
    assert type(config) is type(host.config) and config.to_dict() == host.config.to_dict()


def test_what_measures_any_model_measures_a_factorised_one(tmp_path: Path) -> None:
    host, inputs = tiny_host("llama"), tiny_inputs("llama")
    factorize(host, 0.6)
    host.save_pretrained(tmp_path)
    assert torch.equal(logits(load_any_model(str(tmp_path)), inputs), logits(host, inputs))
    with pytest.raises(ValueError, match=r"plain llama. Load it with gravity_hf.load_factorized"):
        load_gravity_model(tmp_path)


def test_a_folder_within_a_repository_is_loaded(tmp_path: Path) -> None:
    host, inputs = tiny_host("llama"), tiny_inputs("llama")
    factorize(host, 0.6)
    host.save_pretrained(tmp_path / "low")
    again = load_factorized(tmp_path, subfolder="low")
    assert torch.equal(logits(again, inputs), logits(host, inputs))


def test_factors_are_trained_and_saved_as_any_weights(tmp_path: Path) -> None:
    host, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    factorize(host, 0.5)
    host.train()
    host(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in host.parameters())
    torch.optim.SGD(host.parameters(), lr=0.1).step()
    host.eval().save_pretrained(tmp_path, max_shard_size="40KB")
    again = load_factorized(tmp_path, dtype=torch.float64)
    assert again.dtype == torch.float64
    torch.testing.assert_close(logits(again, inputs).float(), logits(host, inputs))


def test_generation_with_a_cache_is_generation_without() -> None:
    host, ids = tiny_host("llama", eos_token_id=None), tiny_inputs("llama")["input_ids"]
    factorize(host, 0.5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        host.generate(ids, **options), host.generate(ids, use_cache=False, **options)
    )


def test_lora_adapts_the_factors_of_a_host() -> None:
    peft = pytest.importorskip("peft")
    host = tiny_host("llama")
    factorize(host, 0.5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj.down", "q_proj.up"])
    adapted = peft.get_peft_model(host, config)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 2 * 2 and all(".q_proj." in name for name in trained)


def test_texts_calibrate_with_a_tokenizer() -> None:
    class Tokenizer:
        """Bytes of a text, below the vocabulary."""

        def __call__(self, text: str, *, max_length: int, **_: Any) -> dict[str, torch.Tensor]:
            ids = torch.tensor([[b % VOCABULARY for b in text.encode()][:max_length]])
            return {"input_ids": ids.long(), "token_type_ids": ids}

    report = factorize(
        tiny_host("llama"), 0.5, calibration=["one", "", "another text"], tokenizer=Tokenizer()
    )
    assert report.calibrated


def test_unpatching_gives_back_a_factorised_host() -> None:
    host, inputs = tiny_host("llama"), tiny_inputs("llama")
    factorize(host, 0.6)
    before = logits(host, inputs)
    unpatch_gravity(patch_with_gravity(host))
    assert torch.equal(logits(host, inputs), before)


def test_a_host_that_was_unpatched_is_saved_as_a_factorised_one(tmp_path: Path) -> None:
    host = patch_with_gravity(tiny_host("llama"))
    factorize(host, 0.6)
    save_factorized(unpatch_gravity(host), tmp_path)
    assert type(load_factorized(tmp_path)) is LlamaForCausalLM
    with pytest.raises((ValueError, OSError), match=r"gravity_hf\.load_factorized"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_was_made_sparse_afterwards_is_read_again(tmp_path: Path) -> None:
    host, inputs = tiny_host("llama"), tiny_inputs("llama", length=40)
    factorize(host, 0.6)
    budget = {"top_k": 12, "block_size": 4, "window": 4, "sinks": 2}
    sparsify_attention(host, budget, screening="learned", screen_dim=4)
    sparsify_feed_forward(host, block_size=8, sparsity=0.5)
    save_factorized(host, tmp_path)
    again = sparsify_feed_forward(sparsify_attention(load_factorized(tmp_path)))
    with sparsity(host, feed_forward="masked"), sparsity(again, feed_forward="masked"):
        assert torch.equal(logits(again, inputs), logits(host, inputs))
