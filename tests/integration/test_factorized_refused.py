"""What `factorize` and `load_factorized` refuse, by name and before anything changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import tiny_host
from torch import nn
from transformers import PreTrainedModel

from gravity_hf import LGTConfig, LGTForCausalLM, factorize, load_factorized


def _tied(host: Any) -> PreTrainedModel:
    host.model.layers[1].mlp.up_proj.weight = host.model.layers[0].mlp.up_proj.weight
    return host


def _offloaded(host: Any) -> PreTrainedModel:
    host.model.layers[0].mlp.up_proj.to("meta")
    return host


def _packed(host: Any) -> PreTrainedModel:
    weight = torch.zeros(64, 48, dtype=torch.int8)
    host.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    return host


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_tied, "tied to model.layers.1.mlp.up_proj.weight"),
        (_offloaded, "offloaded"),
        (_packed, "quantised: its weight is of torch.int8"),
    ],
)
def test_a_map_that_cannot_be_replaced_is_refused_by_name_before_anything_changes(
    spoil: Any, why: str
) -> None:
    host = spoil(tiny_host("llama"))
    keys = set(host.state_dict())
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.mlp\.up_proj: expected.*{why}"):
        factorize(host, 0.5, targets=["up_proj", "q_proj"])
    assert set(host.state_dict()) == keys


def test_a_map_that_cannot_be_replaced_is_left_out_and_said_to_be() -> None:
    report = factorize(_tied(tiny_host("llama")), 0.5)
    tied = [name for name, why in report.skipped.items() if why.startswith("tied")]
    assert tied == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert "model.layers.2.mlp.up_proj" in report.ranks


def test_models_that_are_not_dense_hosts_are_refused() -> None:
    host = tiny_host("llama")
    factorize(host, 0.5)
    with pytest.raises(ValueError, match="got one with maps of low rank"):
        factorize(host, 0.5)
    with pytest.raises(TypeError, match="got Linear"):
        factorize(nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got LGTForCausalLM"):
        factorize(LGTForCausalLM(LGTConfig.from_preset("edge_150k", vocab_size=32)))
    peft = pytest.importorskip("peft")
    adapted = tiny_host("llama")
    peft.get_peft_model(adapted, peft.LoraConfig(r=1, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="got one with adapters"):
        factorize(adapted, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_projj"]}, r"got \['q_projj'\], which fit none. The model has lm_head"),
        ({"targets": "q_proj"}, "Put it in a list"),
        ({"targets": ["q_proj"], "skip": ["self_attn.q_proj"]}, "expected linear maps to replace"),
        ({"rank": "0.95"}, "rank: expected 'energy:0.95'"),
        ({"calibration": ["text"]}, "tokenizer: expected the model's"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize(tiny_host("llama"), **options)


def test_inputs_that_are_not_finite_are_named_before_anything_changes() -> None:
    host = tiny_host("llama")
    with torch.no_grad():
        host.model.embed_tokens.weight[5] = torch.inf
    keys = set(host.state_dict())
    with pytest.raises(ValueError, match=r"q_proj: second_moment: .*with values that are not fin"):
        factorize(host, 0.5, calibration=[{"input_ids": torch.tensor([[4, 5, 6]])}])
    assert set(host.state_dict()) == keys


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        load_factorized(tmp_path / "nowhere")
    host = tiny_host("llama")
    host.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="got a plain llama"):
        load_factorized(tmp_path / "plain")
    factorize(host, 0.5)
    host.config.low_rank["ranks"] = {"model.layers.0.mlp.up_proj": 3}
    host.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="expected the weights that config.low_rank describes"):
        load_factorized(tmp_path / "wrong")
    with pytest.raises(NotImplementedError, match="tp_plan"):
        load_factorized(tmp_path / "wrong", tp_plan="auto")
