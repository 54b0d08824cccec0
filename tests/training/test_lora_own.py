"""LoRA on models that are gravity by construction: constants and masses train in full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli.commands import run
from peft import PeftModel
from torch import Tensor, nn

from gravity_hf import (
    LGTConfig,
    LGTForCausalLM,
    gravity_lora,
    gravity_param_groups,
    gravity_status,
    load_gravity_adapter,
    load_gravity_model,
)
from gravity_hf.training.lora import host_lora

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def base(**settings: object) -> LGTForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    places = {"dim_position": 4, "max_position_embeddings": 32}
    return LGTForCausalLM(LGTConfig(**(sizes | places | settings)))


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    base().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Its folder, and what it answers after a few steps."""
    model = gravity_lora(load_gravity_model(folder), r=2)
    optimizer = torch.optim.AdamW(gravity_param_groups(model, 1e-2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    copies = (".out_proj.lora", ".fc1.lora", ".fc2.lora", ".gravity.modules_to_save")
    for copy in copies:
        assert sum(copy in name for name in moved) == 4, copy
    assert len(moved) == 16
    place = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(place)
    return place, answers(model)


@pytest.mark.parametrize(
    "load",
    [
        lambda _, adapter: load_gravity_model(adapter),
        lambda folder, adapter: load_gravity_adapter(load_gravity_model(folder), adapter),
        lambda folder, adapter: PeftModel.from_pretrained(load_gravity_model(folder), adapter),
    ],
    ids=["folder", "on-its-base", "peft-alone"],
)
def test_an_adapter_brings_constants_and_masses_back(load, folder, adapter) -> None:
    place, expected = adapter
    model = load(folder, place)
    assert torch.equal(answers(model), expected)
    assert not torch.allclose(answers(base()), expected, atol=1e-4)
    status = gravity_status(model)
    assert status.parameters == gravity_status(base()).parameters and len(status.layers) == 2
    merged = model.merge_and_unload()
    torch.testing.assert_close(answers(merged), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_a_deeper_model_is_refused(adapter) -> None:
    with pytest.raises(ValueError, match=r"layers\.1\..*another base"):
        load_gravity_adapter(base(num_hidden_layers=1), adapter[0])


def test_the_status_of_its_folder_does_not_call_it_plain_attention(adapter) -> None:
    said = run("status", adapter[0]).output
    assert "with masses" in said and "plain attention" not in said


def test_there_is_no_host_as_a_control() -> None:
    with pytest.raises(TypeError, match="gravity_lora"):
        host_lora(base())
