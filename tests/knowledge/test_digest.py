"""The digest of a base: any change is seen and named; what is no change is none."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import tiny_host
from transformers import AutoModelForCausalLM, AutoTokenizer

from gravity_hf import load_gravity_model
from gravity_hf.knowledge.digest import (
    CONFIG_LEAF,
    TOKENIZER_LEAF,
    BaseDigest,
    compute_digest,
    digest_of_folder,
    leaf_digest,
    passing_leaves,
)
from gravity_hf.knowledge.errors import IncompatibleBaseError
from gravity_hf.knowledge.tokenizer_digest import tokenizer_digest


def flip_a_bit(tensor: torch.Tensor, position: int = -1) -> None:
    """The lowest bit of one number: the smallest change there is."""
    flat = tensor.detach().reshape(-1)
    whole = flat.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    )
    whole[position] ^= 1


@pytest.fixture(params=["llama", "gpt2", "gravity_llama"])
def base(request):
    return request.getfixturevalue(request.param)


def test_a_flipped_bit_of_any_tensor_is_named(base):
    """Every parameter and buffer in turn, saved with the model or not."""
    model = copy.deepcopy(base)
    saved, passing = compute_digest(model), passing_leaves(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert len(tensors) >= 20
    for name, tensor in tensors:
        flip_a_bit(tensor)
        seen = saved.compare(compute_digest(model)).changed
        seen += BaseDigest(passing).compare(BaseDigest(passing_leaves(model))).changed
        assert seen == [name]
        flip_a_bit(tensor)
    assert compute_digest(model).root == saved.root


def test_name_shape_and_dtype_count():
    numbers = torch.arange(8, dtype=torch.float32)
    digests = {
        leaf_digest("a", numbers),
        leaf_digest("b", numbers),
        leaf_digest("a", numbers.view(2, 4)),
        leaf_digest("a", numbers.view(torch.int32)),
        leaf_digest("a", numbers[:7]),
        leaf_digest("a", numbers.bfloat16()),
        leaf_digest("a", numbers.to(torch.float8_e4m3fn)),
    }
    assert len(digests) == 7
    assert leaf_digest("a", numbers.view(2, 4).T.contiguous().T) == leaf_digest(
        "a", numbers.view(2, 4)
    )


def test_saving_and_loading_changes_nothing(base, tmp_path):
    base.save_pretrained(tmp_path)
    digest = compute_digest(base)
    is_gravity = (tmp_path / "config.json").read_text().count("gravity") > 0
    load = load_gravity_model if is_gravity else AutoModelForCausalLM.from_pretrained
    assert not digest.compare(compute_digest(load(tmp_path)))
    of_files = digest_of_folder(tmp_path)
    assert digest.compare(of_files).names() == [CONFIG_LEAF]
    assert len(of_files.leaves) >= 20


def test_tied_tensors_count_once_and_untying_is_seen(gpt2):
    model = copy.deepcopy(gpt2)
    digest = compute_digest(model)
    assert "lm_head.weight" not in digest.leaves
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert digest.compare(compute_digest(model)) == ([], [], ["lm_head.weight"])


def test_the_configuration_counts(llama):
    model = copy.deepcopy(llama)
    digest = compute_digest(model)
    model.config.rms_norm_eps *= 2
    assert digest.compare(compute_digest(model)).changed == [CONFIG_LEAF]


def test_adapters_on_the_base_are_not_the_base(llama):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(llama)
    digest, passing = compute_digest(model), passing_leaves(model)
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["norm"])
    wrapped = peft.get_peft_model(model, config)
    assert not digest.compare(compute_digest(wrapped))
    assert passing_leaves(wrapped) == passing
    name = "model.layers.0.mlp.down_proj"
    flip_a_bit(wrapped.base_model.model.get_submodule(name).base_layer.weight)
    assert digest.compare(compute_digest(wrapped)).changed == [f"{name}.weight"]


def test_quantised_layers_are_digested_with_their_scales():
    hqq = pytest.importorskip("hqq.core.quantize")
    model = tiny_host("llama", num_hidden_layers=2)
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = hqq.HQQLinear(
        mlp.down_proj, settings, compute_dtype=torch.float32, device="cpu"
    )
    digest = compute_digest(model)
    flip_a_bit(mlp.down_proj.meta["scale"])
    name = "model.layers.0.mlp.down_proj"
    assert digest.compare(compute_digest(model)).changed == [f"{name}.scale"]
    flip_a_bit(mlp.down_proj.meta["scale"])
    flip_a_bit(mlp.down_proj.W_q)
    assert digest.compare(compute_digest(model)).changed == [f"{name}.W_q"]


def test_tensors_without_bytes_are_refused(llama):
    with torch.device("meta"):
        model = type(llama)(llama.config)
    with pytest.raises(IncompatibleBaseError, match="meta device"):
        compute_digest(model)


def test_folders_without_tensors_or_with_one_twice_are_refused(llama, tmp_path):
    with pytest.raises(IncompatibleBaseError, match="got none"):
        digest_of_folder(tmp_path)
    llama.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "old.safetensors").write_bytes(whole)
    with pytest.raises(IncompatibleBaseError, match="again in old.safetensors"):
        digest_of_folder(tmp_path)


def test_a_tokenizer_is_the_same_after_calls_and_after_loading(tokenizer, llama, tmp_path):
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == digest
    assert compute_digest(llama, tokenizer).leaves[TOKENIZER_LEAF] == digest


def test_another_token_or_merge_is_another_tokenizer(tokenizer):
    digest = tokenizer_digest(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["gravity"])
    assert tokenizer_digest(other) != digest
