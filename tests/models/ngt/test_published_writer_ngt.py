"""Models are written as published code reads them, or refused with the reasons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gravity_hf.models.ngt import NGTForCausalLM
from gravity_hf.models.ngt.convert_ngt import convert_reference_state_dict
from gravity_hf.models.ngt.published_tokenizers import tokenizer_of
from gravity_hf.models.ngt.published_writer import write_reference_checkpoint

from .ngt_cases import IDS, tiny
from .published_files import FILES, content, state, tokenizers

TEXT = tokenizer_of(tokenizers()["char"]["state"])


def of_file(kind: str) -> NGTForCausalLM:
    return convert_reference_state_dict(state(kind), num_heads=2)


@pytest.mark.parametrize("kind", FILES)
def test_there_and_back_again_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Key by key; what an older file lacked is there now, and changes nothing either."""
    file = write_reference_checkpoint(
        of_file(kind), TEXT, tmp_path / "runs" / "ngt.pt_best.pt", steps=3, best_val=4.0, seed=7
    )
    assert [path.name for path in file.parent.iterdir()] == ["ngt.pt_best.pt"]
    written, old = torch.load(file, weights_only=True), content(kind)
    added = [key for key in written["model_state"] if key not in old["model_state"]]
    if kind == "legacy":
        assert added == ["mass_emb.weight", *(f"layers.{i}.attn.gravity_bias" for i in (0, 1))]
        old.update({x: content("ngt")[x] for x in ("optimizer_state", "config")})
        old["vocab"]["type"] = "char"
    else:
        assert not added and list(written["model_state"]) == list(old["model_state"])
    for key, tensor in old["model_state"].items():
        assert torch.equal(written["model_state"][key], tensor), key
    groups = old["optimizer_state"].get("param_groups")
    if groups:
        assert written["optimizer_state"]["param_groups"] == groups
    assert written["config"] == old["config"]
    assert written["vocab"] == old["vocab"]
    assert (written["iter"], written["best_val"]) == (3, 4.0)
    loaded = convert_reference_state_dict(written["model_state"], **written["config"])
    assert torch.equal(loaded(IDS % 39).logits, of_file(kind)(IDS % 39).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mass_in_value": True, "use_rsqrt": True},
        {"token_masses": False, "head_bias": False, "lm_head_bias": False},
        {"cutoff": "none", "initial_radius": 2.0},
        {"cutoff": "soft"},
        {"coordinate_positions": "learned_sinusoidal"},
    ],
    ids=str,
)
def test_fixed_models_compute_the_same_by_the_published_layout(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """What they have not is filled in."""
    model = tiny(preset="fixed", **settings)
    file = write_reference_checkpoint(model, TEXT, tmp_path / "ngt.pt")
    written = torch.load(file, weights_only=True)
    loaded = convert_reference_state_dict(written["model_state"], **written["config"])
    assert loaded.config.evolve_last_layer and loaded.config.head_bias
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=2e-6, rtol=2e-6)
    assert (written["model_state"]["layers.1.coord_norm.weight"] == 1.0).all()
    if model.config.cutoff == "none":
        assert written["model_state"]["layers.1.attn.radius_param"] == 2.0


def test_half_precision_is_written_as_float32_and_tied(tmp_path: Path) -> None:
    model = of_file("ngt").bfloat16()
    file = write_reference_checkpoint(model, TEXT, tmp_path / "ngt.pt")
    written = torch.load(file, weights_only=True)["model_state"]
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert written["head.weight"].data_ptr() == written["token_emb.weight"].data_ptr()
    assert torch.equal(written["norm.weight"], state("ngt")["norm.weight"].bfloat16().float())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "v2": ({"preset": "v2"}, "law 'force', not 'power'; repulsive True, .*content_coordinates"),
    "log": ({"preset": "fixed", "cutoff": "log"}, "cutoff 'none' or 'hard' or 'soft', not 'log'"),
    "self": ({"preset": "reference", "exclude_self": True}, "exclude_self False, not True"),
    "wide": ({"preset": "reference", "head_coord_dim": 8}, "head_coord_dim 16, not 8"),
    "untied": ({"preset": "reference", "tie_word_embeddings": False}, "tie_word_embeddings True"),
    "alibi": ({"attention": "dot_product", "positions": "alibi"}, "positions 'learned', not 'al"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_published_layout_cannot_say_is_refused(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        write_reference_checkpoint(tiny(**settings), TEXT, tmp_path / "ngt.pt")
    assert not list(tmp_path.iterdir())


def test_other_refusals_leave_files_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "ngt.pt"
    file.write_text("precious")
    with pytest.raises(ValueError, match="expected a new file, got one that exists"):
        write_reference_checkpoint(of_file("ngt"), TEXT, file)
    model = of_file("ngt")
    with pytest.raises(ValueError, match="expected an NGTForCausalLM.*got a NGTModel"):
        write_reference_checkpoint(model.model, TEXT, tmp_path / "new.pt")
    larger = tokenizer_of(tokenizers()["bpe"]["state"])
    with pytest.raises(ValueError, match="tokenizer: expected at most 39 tokens"):
        write_reference_checkpoint(model, larger, tmp_path / "new.pt")
    model.register_buffer("adapter", torch.ones(1))
    with pytest.raises(ValueError, match="got adapter as well. Merge adapters"):
        write_reference_checkpoint(model, TEXT, tmp_path / "new.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["ngt.pt"]
    assert file.read_text() == "precious"


def test_resized_vocabularies_are_written_whole(tmp_path: Path) -> None:
    model = of_file("ngt")
    model.resize_token_embeddings(42)
    file = write_reference_checkpoint(model, TEXT, tmp_path / "ngt.pt")
    written = torch.load(file, weights_only=True)
    masses: Tensor = torch.nn.functional.softplus(written["model_state"]["mass_emb.weight"][39:])
    torch.testing.assert_close(masses, torch.ones(3, 1))
    assert written["config"]["vocab_size"] == 42
    assert math.isinf(written["best_val"])
