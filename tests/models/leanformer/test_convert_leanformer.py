"""Published checkpoints: every weight is used, and the numbers are the published ones, causal."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models.leanformer.published_forward import SETTINGS, published_logits, published_state
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gravity_hf import LeanFormerForCausalLM
from gravity_hf.models.leanformer import convert_leanformer
from gravity_hf.models.leanformer.convert_leanformer import (
    convert_leanformer_checkpoint,
    convert_reference_state_dict,
)
from gravity_hf.models.leanformer.published import our_state, published_config

# Of published configs: values, and how many parameters their models have.
COUNTS: dict[str, tuple[tuple[Any, ...], int]] = {
    "tiny": ((50257, 128, 4, 4, 512, 256, 16, 16, 4, 4), 7_488_977),
    "small": ((50257, 512, 8, 12, 2048, 1024, 32, 32, 8, 8), 32_945_441),
    "scale": ((50257, 512, 8, 12, 2048, 512, 64, 64, 16, 16), 39_198_529),
    "reasoning_core": ((50257, 768, 12, 12, 3072, 512, 96, 96, 24, 24), 66_207_457),
    "reasoning_core, 32000": ((32000, 768, 12, 12, 3072, 512, 96, 96, 24, 24), 50_433_409),
    "204M": ((32000, 1536, 24, 20, 6144, 512, 192, 192, 48, 48), 204_227_329),
    "demo": ((32000, 256, 4, 6, 1024, 256, 24, 24, 6, 6), 9_992_577),
}
_NAMES = ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "max_seq_len")
_NAMES += ("attention_rank", "ff_rank", "screening_rank", "ff_gate_rank")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return published_state()


@pytest.fixture
def source(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A folder as published training writes it."""
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    deltas = {"delta_rank": 4, "delta_encoding_lr": 0.01}
    (folder / "leanformer_config.json").write_text(json.dumps({**SETTINGS, **deltas}))
    return folder


# Below, at and above `attention_top_k`, to the last position.
@pytest.mark.parametrize("length", [1, 3, 4, 5, 20])
def test_it_computes_the_published_numbers_made_causal(
    state: dict[str, Tensor], length: int
) -> None:
    ids = torch.randint(SETTINGS["vocab_size"], (length,))
    model = convert_reference_state_dict(state, **SETTINGS).double()
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    torch.testing.assert_close(found, published_logits(state, ids), atol=1e-9, rtol=1e-9)


def test_in_float32_it_is_as_close_as_that_allows(state: dict[str, Tensor]) -> None:
    quiet = {name: value if value.dim() == 1 else 0.3 * value for name, value in state.items()}
    ids = torch.randint(SETTINGS["vocab_size"], (12,))
    with torch.no_grad():
        found = convert_reference_state_dict(quiet, **SETTINGS)(ids[None]).logits[0]
    assert (found - published_logits(quiet, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize(("values", "count"), COUNTS.values(), ids=COUNTS)
def test_published_models_have_as_many_parameters(values: tuple[Any, ...], count: int) -> None:
    config = published_config(**dict(zip(_NAMES, values, strict=True)))
    with torch.device("meta"):
        model = LeanFormerForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(list(model.parameters())) == 33 * config.num_hidden_layers + 10


@pytest.mark.parametrize(("inner", "kept"), [(2048, 409), (3072, 614), (6144, 1228)])
def test_as_many_neurons_count_as_in_published_code(inner: int, kept: int) -> None:
    config = published_config(d_ff=inner, ff_sparsity_target=0.8, n_layers=2)
    with torch.device("meta"):
        model = LeanFormerForCausalLM(config)
    assert model.model.layers[0].mlp.keep == kept


def test_a_published_folder_becomes_one_that_auto_classes_load(
    source: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = convert_leanformer_checkpoint(source, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LeanFormerForCausalLM and model.config.compat_reference
    ids = torch.arange(8)[None]
    expected = convert_reference_state_dict(state, **SETTINGS)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_file_without_a_config_takes_its_settings_from_the_caller(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "exit_tuned.pt"
    torch.save({"model_state_dict": {k: v.half() for k, v in state.items()}}, file)
    with pytest.raises(ValueError, match="got no n_heads, attention_top_k, ff_sparsity_target"):
        convert_leanformer_checkpoint(file, tmp_path / "ours")
    folder = convert_leanformer_checkpoint(
        file, tmp_path / "ours", n_heads=2, attention_top_k=4, ff_sparsity_target=0.7
    )
    assert (folder / "config.json").is_file()


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model_state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        convert_leanformer_checkpoint(tmp_path / "trap.pt", tmp_path / "ours")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def test_unknown_and_missing_weights_are_named(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"got layers\.0\.attn\.extra\.A beside them"):
        our_state({**state, "layers.0.attn.extra.A": torch.zeros(2, 2)})
    fewer = {k: v for k, v in state.items() if k != "layers.1.ff.down_proj.bias"}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.up\.bias: missing"):
        convert_reference_state_dict(fewer, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 32}, "d_model: expected 16, which the weights say, got 32"),
        ({"ff_rank": 7}, "ff_rank: expected 6"),
        ({"n_heds": 2}, "settings: expected published ones"),
        ({"ff_sparsity_target": 1.0}, r"ff_sparsity_target: expected a number in \[0, 1\)"),
        ({"attention_top_k": 0}, "attention_top_k: expected"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    state: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_reference_state_dict(state, **{**SETTINGS, **change})


def test_a_rank_above_the_widths_is_the_one_that_published_code_takes() -> None:
    settings = {**SETTINGS, "screening_rank": 99}
    model = convert_reference_state_dict(published_state(settings), **settings)
    assert model.config.screen_dim == SETTINGS["d_model"] // 4


def test_a_model_of_one_layer_has_nobody_who_could_leave() -> None:
    settings = {**SETTINGS, "n_layers": 1, "min_depth": 4}
    state, ids = published_state(settings), torch.arange(9)
    found = convert_reference_state_dict(state, **settings).double()(ids[None]).logits[0]
    torch.testing.assert_close(found, published_logits(state, ids, settings), atol=1e-9, rtol=1e-9)


def test_the_command_says_what_to_do_next_and_what_is_wrong(source: Path, tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(convert_leanformer.command)
    runner, target = CliRunner(), tmp_path / "ours"
    done = runner.invoke(app, [str(source), str(target)])
    assert done.exit_code == 0, done.output
    assert "AutoModelForCausalLM" in done.output and "--tokenizer" in done.output
    again = runner.invoke(app, [str(source), str(target)])
    assert again.exit_code == 1 and "expected a new or empty folder" in again.output
    shutil.rmtree(target)
    (source / "pytorch_model.bin").unlink()
    wrong = runner.invoke(app, [str(source), str(target)])
    assert wrong.exit_code == 1 and "pytorch_model.bin" in wrong.output


def test_a_folder_without_a_tokenizer_is_a_warning(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        convert_leanformer_checkpoint(source, tmp_path / "ours")
    assert "no tokenizer was given" in caplog.text
