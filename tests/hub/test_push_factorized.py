"""Factorised hosts on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from hub.loopback import WRITER, LoopbackHub
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from gravity_hf import (
    factorize,
    load_factorized,
    patch_with_gravity,
    push_gravity_model,
    save_factorized,
)


def test_a_pushed_factorised_host_is_loaded_again_and_by_nothing_else(hub: LoopbackHub) -> None:
    host, inputs = tiny_host("llama"), tiny_inputs("llama")
    factorize(host, 0.6)
    host.push_to_hub("me/low-rank")
    assert {"config.json", "model.safetensors"} <= hub.repo("me/low-rank").paths()
    again = load_factorized("me/low-rank")
    assert type(again) is type(host)
    assert torch.equal(logits(again, inputs), logits(host, inputs))
    with pytest.raises((ValueError, OSError), match="load_factorized"):
        AutoModelForCausalLM.from_pretrained("me/low-rank")


@pytest.mark.parametrize("gravity", [False, True])
def test_a_folder_with_maps_of_low_rank_is_told_how_it_is_uploaded(
    gravity: bool, tmp_path: Path
) -> None:
    host = tiny_host("llama")
    if gravity:
        patch_with_gravity(host)
    factorize(host, 0.6)
    host.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"maps of low rank.*save_factorized.*upload_folder"):
        push_gravity_model(tmp_path, "me/low-rank", dry_run=True)


def test_with_gravity_it_is_loaded_again_after_the_upload_that_a_refused_push_names(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    host, inputs = patch_with_gravity(tiny_host("llama")), tiny_inputs("llama")
    factorize(host, 0.6)
    with pytest.raises(ValueError, match="huggingface_hub.upload_folder"):
        host.push_to_hub("me/both")
    save_factorized(host, tmp_path)
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.create_repo("me/both")
    api.upload_folder(folder_path=tmp_path, repo_id="me/both")
    assert torch.equal(logits(load_factorized("me/both"), inputs), logits(host, inputs))
