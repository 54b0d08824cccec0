"""LeanFormers of dense hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import VOCABULARY, tiny_host
from torch import Tensor
from transformers import AutoModelForCausalLM

from gravity_hf import (
    LeanFormerForCausalLM,
    patch_with_gravity,
    sparsify_attention,
    sparsify_feed_forward,
    sparsity,
)
from gravity_hf.integration.factorized import factorize

HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, a tied head and wide heads": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama with scaled positions": (
        "llama",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral with a window": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
SPARSE = {
    **{"screening": "learned", "screen_dim": 4, "attention_top_k": 12, "local_window": 4},
    **{"sink_tokens": 2, "feed_forward_block": 8, "feed_forward_sparsity": 0.5, "gate_rank": 8},
}


def ids_of(seed: int, batch: int = 4, length: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def batches() -> list[dict[str, Tensor]]:
    ids = ids_of(1, batch=16)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids.split(8)]


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def energy_recall(model: LeanFormerForCausalLM, ids: Tensor) -> Tensor:
    """The share of the neurons' energy that the predictors choose, mean over layers."""
    seen: list[Tensor] = []

    def look(mlp: Any, given: tuple[Tensor, ...]) -> None:
        seen.append(mlp.quality(given[0]).energy_recall)

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(look)
    with sparsity(model, attention="dense"):
        logits_of(model, ids)
    return torch.stack(seen).mean()


@pytest.mark.parametrize(("name", "changes"), HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("rank", ["full", "energy:1.0"])
def test_at_full_rank_the_logits_are_the_hosts(
    name: str, changes: dict[str, Any], rank: str
) -> None:
    host, ids = tiny_host(name, **changes), ids_of(0)
    model = LeanFormerForCausalLM.from_dense(host, rank)
    assert (logits_of(model, ids) - logits_of(host, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_low_ranks_are_those_of_the_host_factorised_in_place(name: str) -> None:
    host, ids = tiny_host(name), ids_of(0)
    model = LeanFormerForCausalLM.from_dense(host, 0.7, calibration=batches())
    report = factorize(host, 0.7, calibration=batches())
    assert {f"model.{k}": v for k, v in model.config.rank_pattern.items()} == report.ranks
    torch.testing.assert_close(logits_of(model, ids), logits_of(host, ids), atol=1e-4, rtol=1e-4)


def test_calibration_makes_a_model_of_the_same_ranks_closer() -> None:
    host = tiny_host("llama")
    shown = [{"input_ids": ids_of(5, batch=8) % 7 + 3}]
    ids = ids_of(6) % 7 + 3
    far, near = (
        (
            logits_of(LeanFormerForCausalLM.from_dense(host, 0.5, calibration=x), ids)
            - logits_of(host, ids)
        )
        for x in (None, shown)
    )
    assert near.square().mean() < 0.5 * far.square().mean()


def test_the_host_is_not_changed_and_shares_nothing() -> None:
    host = tiny_host("llama").train()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    model = LeanFormerForCausalLM.from_dense(host, 0.5, calibration=batches(), **SPARSE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert host.training and not model.training
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())


def test_it_is_saved_and_generates_as_any_leanformer(tmp_path: Path) -> None:
    host = tiny_host("qwen3", eos_token_id=None)
    model = LeanFormerForCausalLM.from_dense(host, 0.5, calibration=batches(), **SPARSE)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = ids_of(2, batch=1)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = again.generate(ids, **options)
    assert torch.equal(cached, again.generate(ids, use_cache=False, **options))


def test_it_has_the_dtype_and_the_generation_settings_of_the_host() -> None:
    host = tiny_host("llama").to(torch.bfloat16)
    host.generation_config.temperature = 0.3
    model = LeanFormerForCausalLM.from_dense(host, 0.5)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.3
    assert model.generation_config is not host.generation_config


def test_the_predictor_starts_with_what_inputs_say_about_neurons() -> None:
    host, ids = tiny_host("llama"), ids_of(9)
    with torch.no_grad():
        # As in trained models the inputs have a mean, without which a map without a bias can say
        # nothing for all of them; and every other block is loud, which its gates do not tell.
        host.model.embed_tokens.weight += 1
        for layer in host.model.layers:
            layer.mlp.up_proj.weight.unflatten(0, (-1, 2, 8))[:, 1] *= 5
    recalls = {}
    for name, shown in (("weights", None), ("inputs", batches())):
        model = LeanFormerForCausalLM.from_dense(host, "full", calibration=shown, **SPARSE)
        recalls[name] = energy_recall(model, ids)
    assert recalls["inputs"] > 0.9 > 0.75 > recalls["weights"]


def test_padding_says_nothing_about_maps_keys_and_neurons() -> None:
    host, ids = tiny_host("llama").double(), ids_of(3)
    mask = torch.ones_like(ids)
    mask[:, 25:] = 0
    whole = {"input_ids": ids, "attention_mask": mask}
    padded, alone = (
        LeanFormerForCausalLM.from_dense(host, 0.5, calibration=[shown], **SPARSE).state_dict()
        for shown in (whole, {"input_ids": ids[:, :25]})
    )
    for name, value in padded.items():
        torch.testing.assert_close(value.abs(), alone[name].abs(), rtol=1e-4, atol=1e-6)


def test_the_screening_starts_along_the_axes_of_the_keys() -> None:
    host = tiny_host("llama")
    model = LeanFormerForCausalLM.from_dense(host, "full", calibration=batches(), **SPARSE)
    for layer in model.model.layers:
        axes = layer.self_attn.screening.key
        gram = axes.mT @ axes
        torch.testing.assert_close(gram, torch.eye(4).expand_as(gram), atol=1e-5, rtol=0)
    other = LeanFormerForCausalLM.from_dense(host, "full", calibration=batches(), **SPARSE)
    for one, two in zip(model.model.layers, other.model.layers, strict=True):
        assert torch.equal(one.self_attn.screening.key, two.self_attn.screening.key)


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_other_hosts_are_told_which_can_be_and_what_they_can_do(name: str) -> None:
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM.*factorize\(model\)"):
        LeanFormerForCausalLM.from_dense(tiny_host(name))


def test_hosts_that_were_changed_are_refused() -> None:
    patched = patch_with_gravity(tiny_host("llama"))
    with pytest.raises(TypeError, match="got GravityLlamaForCausalLM"):
        LeanFormerForCausalLM.from_dense(patched)
    low = tiny_host("llama")
    factorize(low, 0.5)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj is of low rank or sparse"):
        LeanFormerForCausalLM.from_dense(low)
    budget = {"top_k": 12, "block_size": 4, "window": 4, "sinks": 2}
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn is of low rank or sparse"):
        LeanFormerForCausalLM.from_dense(sparsify_attention(tiny_host("llama"), budget))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp is of low rank or sparse"):
        LeanFormerForCausalLM.from_dense(sparsify_feed_forward(tiny_host("llama"), block_size=8))
    meta = tiny_host("llama")
    meta.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"mlp\.up_proj is a changed, sharded, quantised or offl"):
        LeanFormerForCausalLM.from_dense(meta)
    mixed = tiny_host(
        "qwen2",
        **{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    with pytest.raises(ValueError, match="expected layers that all see as far"):
        LeanFormerForCausalLM.from_dense(mixed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 64}, r"settings that the host does not say, got \['hidden_size'\]"),
        ({"attention_rank": 4}, r"got \['attention_rank'\]"),
        ({"attention": "gravity"}, r"got \['attention'\]"),
        ({"attention_topk": 4}, "Did you mean attention_top_k"),
        ({"feed_forward_block": 7}, "feed_forward_block: expected a divisor"),
        ({"rank": "0.9"}, "rank: expected 'energy:0.95'"),
        ({"calibration": ["a text"]}, "tokenizer: expected the model's"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeanFormerForCausalLM.from_dense(tiny_host("llama"), **settings)
