"""A model that is gravity by construction is pushed with a card of what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub.loopback import LoopbackHub
from hub.ngt_results import RECORD, saved_ngt
from hub.ngt_results import config as ngt_config
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from gravity_hf import (
    LGTConfig,
    LGTForCausalLM,
    NGTForCausalLM,
    TriModel,
    TriModelConfig,
    gravity_lora,
    load_gravity_model,
    push_gravity_model,
)
from gravity_hf.hub.extras import Extras
from gravity_hf.hub.staging import staged

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "dim_position": 4,
    "max_position_embeddings": 32,
}


def lgt() -> LGTForCausalLM:
    torch.manual_seed(0)
    return LGTForCausalLM(LGTConfig(**SIZES)).eval()


def ngt() -> NGTForCausalLM:
    torch.manual_seed(0)
    return NGTForCausalLM(ngt_config()).eval()


@pytest.mark.parametrize(("make", "tag"), [(lgt, "lgt"), (ngt, "ngt")])
def test_push_to_hub_is_one_commit_with_a_card_that_says_so(
    make: Callable[[], PreTrainedModel], tag: str, hub: LoopbackHub
) -> None:
    model = make()
    model.add_model_tags(["mine"])
    done = model.push_to_hub(f"me/{tag}", tags="yours", commit_message="m")
    repo = hub.repo(f"me/{tag}")
    assert repo.messages == ["initial commit", "m"] and done.oid == repo.oid("main")
    assert {"config.json", "model.safetensors", "README.md"} <= repo.paths()
    assert "modeling_gravity.py" not in repo.paths()
    card = ModelCard(repo.tree("main")["README.md"].content.decode())
    assert {"mine", "yours", "gravity-attention", tag} <= set(card.data.tags)
    assert "More Information Needed" not in card.text
    again = load_gravity_model(f"me/{tag}").eval()
    ids = torch.arange(8)[None]
    assert type(again) is type(model)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_cannot_be_pushed_says_what_to_do(tmp_path: Path) -> None:
    model = lgt()
    adapted = gravity_lora(model)
    with pytest.raises(TypeError, match="merge_and_unload"):
        push_gravity_model(adapted, "me/x", dry_run=True)
    # The same object, with layers of the adapter in it.
    with pytest.raises(RuntimeError, match="merge_and_unload"):
        push_gravity_model(model, "me/x", dry_run=True)
    TriModel(TriModelConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no card is made"):
        push_gravity_model(tmp_path, "me/x", dry_run=True)


def test_of_a_training_one_model_goes_up_and_no_place_on_this_machine(tmp_path: Path) -> None:
    saved_ngt(tmp_path)
    for kept in ("best", "last"):
        saved_ngt(tmp_path / kept)
        (tmp_path / kept / "validation.json").write_text("{}")
    saved_ngt(tmp_path / "mine")
    (tmp_path / "pretrain_settings.json").write_text("{}")
    (tmp_path / "pretrain.json").write_text(json.dumps(RECORD))
    with staged(tmp_path, "me/ngt", Extras(), online=False) as laid_out:
        assert "mine/model.safetensors" in laid_out.files
        assert not any(path.startswith(("best", "last", "pretrain_s")) for path in laid_out.files)
        assert "left out: best/, last/, pretrain_settings.json" in laid_out.notices
        assert "/home" not in laid_out.files["pretrain.json"].read_text()
