"""Cards of folders that no conversion described: settings and tensors speak, nothing is claimed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from hub.card_results import RESULTS, section, table
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, calibrate, gravity_lora, patch_with_gravity
from gravity_hf.hub.card_tensors import gravity_layers
from gravity_hf.hub.cards import card_of_folder, write_card
from gravity_hf.integration.hosts import gravity_modules


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host") / "my-host"
    tiny_host("qwen2").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My host\n")
    return folder


@pytest.fixture(scope="module")
def model(host: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    patched = patch_with_gravity(AutoModelForCausalLM.from_pretrained(host), GravityConfig())
    calibrate(patched, [tiny_inputs("qwen2")], softness=1.0, progress=False)
    return patched


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "plain"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(
    host: Path, model: PreTrainedModel, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    # `saved` comes first: LoRA changes the model.
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    gravity_lora(model, r=4).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_constants_come_from_the_tensors(saved: Path, model: PreTrainedModel) -> None:
    rows = gravity_layers(saved)
    modules = gravity_modules(model)
    assert [row["layer"] for row in rows] == list(modules)
    for row, module in zip(rows, modules.values(), strict=True):
        terms = module()
        assert row["mass"]["median"] == pytest.approx(terms.mass.double().quantile(0.5).item())
        assert row["softening"]["highest"] == pytest.approx(terms.softening.max().item())
        assert row["key_radius"]["lowest"] == pytest.approx(terms.key_radius_sq.sqrt().min().item())
    cells = table(section(card_of_folder(saved, "me/plain"), "The law"))[1]
    assert cells[1] == str(rows[0]["mass"]["count"])
    assert cells[2].split(" / ")[1] == f"{rows[0]['mass']['median']:.4g}"


def test_settings_are_those_of_the_folder(saved: Path) -> None:
    card = card_of_folder(saved, "me/plain")
    changed = section(card, "What was changed")
    assert "Qwen2ForCausalLM" in changed and "softness 1;" in changed
    assert "`gravity_qwen2`" in card.text and "up to 128 tokens" in card.text
    assert card.data.pipeline_tag == "text-generation" and card.data.base_model is None


def test_parameters_are_counted_from_the_headers(saved: Path, host: Path) -> None:
    from transformers import AutoModelForCausalLM

    count = AutoModelForCausalLM.from_pretrained(host).num_parameters()
    cells = dict(table(section(card_of_folder(saved, "x"), "What was changed")))
    assert cells["parameters of the host"] == f"{count:,}"


def test_nothing_measured_nothing_claimed(saved: Path, adapter: Path) -> None:
    for folder in (saved, adapter):
        card = card_of_folder(folder, "me/plain")
        assert card.data.eval_results is None and card.data.model_name is None
        assert "Nothing was measured" in section(card, "What was measured")
        assert "contrast not measured" in card.text
        assert "How it was made is not recorded" in card.text
        assert "the host with the same training: not measured" in card.text
        assert not re.search(r"\d\.\d", section(card, "What was measured"))
        assert not re.search(r"\d\.\d", section(card, "What it cannot do"))


def test_a_host_that_is_named_lends_its_licence(saved: Path, host: Path) -> None:
    assert "license" not in card_of_folder(saved, "x").data.to_dict()
    card = card_of_folder(saved, "x", host=str(host))
    assert card.data.license == "mit" and "`my-host`" in card.text
    assert str(host.parent) not in str(card)


def test_an_adapter_is_described_as_one(adapter: Path, host: Path) -> None:
    card = card_of_folder(adapter, "me/lora")
    assert card.data.license == "mit" and card.data.library_name == "gravity_hf"
    assert "LoRA: rank 4, alpha 16." in card.text and "`my-host`" in card.text
    lora = load_file(adapter / "adapter_model.safetensors")
    count = sum(tensor.numel() for name, tensor in lora.items() if "lora_" in name)
    assert f"{count:,} of LoRA" in card.text
    assert "`model.layers.0.self_attn`" in section(card, "The law")
    assert "trust_remote_code" not in section(card, "How to load it")
    assert str(host.parent) not in str(card)


def test_an_adapter_that_peft_would_load_wrongly_says_so(adapter: Path, tmp_path: Path) -> None:
    assert "refuses the adapter" in card_of_folder(adapter, "x").text
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "LORA"}))
    text = card_of_folder(copy, "x").text
    assert "saved as an ordinary LoRA" in text and "refuses the adapter" not in text


def test_results_in_the_folder_are_what_the_card_says(copy: Path) -> None:
    (copy / "results.json").write_text(json.dumps({**RESULTS, "layers": None}))
    card = card_of_folder(copy, "me/out")
    assert "2.4125" in card.text
    # Constants that the file lacks come from the tensors beside it.
    assert "`model.layers.0.self_attn`" in section(card, "The law")


def test_pictures_are_shown_in_the_order_of_their_list(copy: Path) -> None:
    entries = [
        {"name": "b", "file": "b.png", "title": "Second letter", "caption": "What b shows."},
        {"name": "a", "file": "a.png", "title": "First letter", "caption": "What a shows."},
        {"name": "gone", "file": "gone.png", "title": "Gone", "caption": "It is not there."},
    ]
    assert "## Figures" not in card_of_folder(copy, "x").text
    (copy / "figures").mkdir()
    (copy / "figures" / "figures.json").write_text(json.dumps(entries))
    for name in "ab":
        (copy / "figures" / f"{name}.png").write_bytes(b"")
    write_card(copy, copy / "README.md")
    text = (copy / "README.md").read_text()
    assert "![Second letter](figures/b.png)\n\nWhat b shows.\n\n![First letter]" in text
    assert "Gone" not in text


@pytest.mark.parametrize("content", ["{", '["a.png"]', '[{"file": "../a.png", "title": "a"}]'])
def test_a_list_of_pictures_that_cannot_be_is_refused(copy: Path, content: str) -> None:
    (copy / "figures").mkdir()
    (copy / "figures" / "figures.json").write_text(content)
    with pytest.raises(ValueError, match=r"figures\.json.*Draw them again"):
        card_of_folder(copy, "x")


def test_folders_that_are_no_gravity_models_are_refused(
    host: Path, copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"found neither config\.json nor adapter_config\.json"):
        card_of_folder(tmp_path, "x")
    with pytest.raises(ValueError, match=r"config\.json.*not a gravity model"):
        card_of_folder(host, "x")
    file = copy / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if ".gravity." not in n}, file)
    with pytest.raises(ValueError, match="expected gravity tensors"):
        card_of_folder(copy, "x")
    broken = {n: torch.full_like(t, torch.nan) if "radius" in n else t for n, t in tensors.items()}
    save_file(broken, file)
    with pytest.raises(ValueError, match="expected finite values, got others in its key radius"):
        card_of_folder(copy, "x")


LORA_RUN = {
    "format": 1,
    "settings": {
        **{"seed": 0, "length": 64, "samples": 4, "batch_size": 2, "accumulation": 1},
        **{"steps": 30, "rank": 4, "alpha": 16, "learning_rate": 2e-4},
    },
    "model": {"class": "GravityQwen2ForCausalLM", "calibration": None},
    "training": {"losses": [], "text": "one file", "digest": "00"},
    "evaluation": {"loss_before": 2.625, "loss_after": 2.125, "examples": 7},
    "conditions": RESULTS["conditions"],
}


def test_an_adapter_of_a_lora_run_says_what_that_measured(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    (copy / "results.json").write_text(json.dumps(LORA_RUN))
    card = card_of_folder(copy, "me/lora")
    _, before, after = table(section(card, "What was measured"))
    assert before[:2] == ["gravity, before LoRA", "2.6250"]
    assert after[:2] == ["gravity, after LoRA", "2.1250"] and after[2:] == ["not measured"] * 3
    made = section(card, "How it was made")
    assert "rank 4, alpha 16, 30 steps of 2 x 1 windows" in made
    assert "same LoRA, for comparison: not measured" in made
    assert [result.metric_value for result in card.data.eval_results] == [2.125]
    assert "Qwen2ForCausalLM" in card.text and "7 examples measured" in card.text
    assert "None" not in str(card)


@pytest.mark.parametrize(("local", "claimed"), [(True, None), (False, "runs/host"), (None, None)])
def test_a_run_says_whether_its_base_was_a_folder(
    adapter: Path, tmp_path: Path, local: bool | None, claimed: str | None
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    file = copy / "adapter_config.json"
    config = {**json.loads(file.read_text()), "base_model_name_or_path": "runs/host"}
    file.write_text(json.dumps(config))
    run = {**LORA_RUN, "model": {**LORA_RUN["model"], "local": local, "dtype": "bfloat16"}}
    (copy / "results.json").write_text(json.dumps(run))
    card = card_of_folder(copy, "me/lora", online=False)
    assert card.data.base_model == claimed and "bfloat16 weights" in card.text
