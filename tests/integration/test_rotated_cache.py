"""A cache of a few bits: what it takes, what it keeps, and that `generate` can do all with it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from integration.running import generate, gravity_host, host, inputs_of, left_padded
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from gravity_hf import (
    GravityConfig,
    KeyBudget,
    LeanFormerConfig,
    LeanFormerForCausalLM,
    RotatedQuantCache,
    sparsify_attention,
)
from gravity_hf.integration.published_layer import PublishedQuantLayer

HEADS, WIDTH = 2, 64
EAGER = {"residual": 4, "min_length": 0}  # packs from the fourth token on
FINE = {"nbits_k": 8, "nbits_v": 8, **EAGER}


@pytest.fixture(autouse=True)
def _one_name_for_two_versions():
    with warnings.catch_warnings():
        # `past_key_values` is what both versions of transformers take.
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def states(tokens: int, seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, batch, HEADS, tokens, WIDTH, generator=generator)
    return made[0], made[1]


def filled(tokens: int, dtype=torch.float32, batch: int = 1, **options) -> RotatedQuantCache:
    cache = RotatedQuantCache(**options)
    keys, values = states(tokens, batch=batch)
    cache.update(keys.to(dtype), values.to(dtype), 0)
    return cache


def read(cache: RotatedQuantCache) -> tuple[Tensor, Tensor]:
    """Keys and values as the next token would see them."""
    layer = copy.deepcopy(cache).layers[0]
    batch = layer.keys.shape[0]
    keys, values = layer.update(*(x.to(layer.keys.dtype) for x in states(1, 9, batch)))
    return keys[:, :, :-1], values[:, :, :-1]


@pytest.mark.parametrize("tokens", [8192, 8192 + 63])
def test_a_context_of_8k_is_three_and_a_half_times_smaller(tokens):
    """At its best and at its worst: with as few and as many plain tokens as there can be."""
    cache = filled(tokens, torch.bfloat16)
    memory = cache.memory()
    assert memory["fp16_bytes"] == 2 * HEADS * tokens * WIDTH * 2
    assert memory["ratio"] == memory["fp16_bytes"] / memory["bytes"] > 3.5
    assert memory["tokens"] - memory["packed_tokens"] == (64 if tokens == 8192 else 127)
    assert memory["working_bytes"] == memory["fp16_bytes"]


def test_memory_counts_the_storages_of_all_that_is_held():
    cache = filled(300, min_length=0)
    layer = cache.layers[0]
    packed = (*layer.packed_keys, *layer.packed_values)
    plain = 2 * HEADS * WIDTH * 4 * (300 - layer.packed_length)
    assert sum(x.untyped_storage().nbytes() for x in packed) == 2 * HEADS * 34 * layer.packed_length
    turn = WIDTH * WIDTH * 4  # one for all layers
    assert cache.memory()["bytes"] == plain + 2 * HEADS * 34 * layer.packed_length + turn


def test_memory_counts_the_matrix_of_every_dtype_that_it_turns_in():
    cache = filled(300, torch.bfloat16, min_length=0)
    layer = cache.layers[0]
    held = sum(x.untyped_storage().nbytes() for x in (*layer.packed, layer.keys, layer.values))
    assert cache.memory()["bytes"] == held + WIDTH * WIDTH * (4 + 2)


def test_what_is_packed_is_never_written_anew():
    cache = filled(40, **EAGER)
    before = [x.clone() for x in cache.layers[0].packed]
    for seed in range(1, 12):
        cache.update(*states(1 + seed % 3, seed), 0)
        now = cache.layers[0].packed
        assert all(torch.equal(x, y[:, :, : x.shape[2]]) for x, y in zip(before, now, strict=True))
        before = [x.clone() for x in now]
    assert before[0].shape[2] > 50


def test_the_newest_tokens_are_read_as_they_were_and_the_rest_nearly():
    cache = filled(200, min_length=0)
    for given, got in zip(states(200), read(cache), strict=True):
        assert torch.equal(given[:, :, -64:], got[:, :, -64:])
        old, new = given[:, :, :-128], got[:, :, :-128]
        assert 0 < (old - new).norm() < 0.095 * old.norm()


def test_a_prompt_attends_to_its_own_keys_as_they_were():
    cache = RotatedQuantCache(**EAGER)
    for given, got in zip(states(50), cache.update(*states(50), 0), strict=True):
        assert torch.equal(given, got)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
def test_below_its_length_a_cache_is_a_dynamic_cache(family):
    model, inputs = host(family), left_padded(family)
    cache = RotatedQuantCache(config=model.config, residual=4, min_length=22 + 1)
    run = generate(model, inputs, past_key_values=cache)
    expected = generate(model, inputs)
    assert torch.equal(run.logits, expected.logits)
    assert run.cache is cache and cache.memory()["packed_tokens"] == 0


FAMILIES = ["qwen2", "gpt2", "gpt_neox", "gemma3", "values narrower than keys"]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_from_eight_bits_is_the_text(family):
    model, inputs = host(family), left_padded(family)
    cache = RotatedQuantCache(config=model.config, **FINE)
    run, expected = generate(model, inputs, past_key_values=cache), generate(model, inputs)
    assert torch.equal(run.text, expected.text)
    assert 0 < (run.logits - expected.logits).norm() < 0.02 * expected.logits.norm()
    assert cache.memory()["packed_tokens"] == 20


def test_layers_with_a_window_keep_what_they_would():
    model = host("gemma3")
    cache = RotatedQuantCache(config=model.config, **FINE)
    generate(model, left_padded("gemma3"), past_key_values=cache)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "RotatedQuantLayer", "DynamicSlidingWindowLayer"]
    memory = cache.memory()
    assert memory["packed_layers"] == 1
    assert memory["other_layers"] == ["DynamicSlidingWindowLayer"]


@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "a smaller host"},
    ],
    ids=["beams", "prompt lookup", "assistant"],
)
def test_every_way_to_generate_works(way):
    model = host("qwen2")
    inputs = {name: x[1:] for name, x in inputs_of("qwen2").items()}
    if "assistant_model" in way:
        way = {"assistant_model": host("qwen2", num_hidden_layers=1)}
    options = {**way, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cache = RotatedQuantCache(config=model.config, **FINE)
    text = model.generate(**inputs, **options, past_key_values=cache)
    assert torch.equal(text, model.generate(**inputs, **options))
    assert cache.memory()["packed_tokens"] >= 18


def test_samples_from_one_cache_are_the_same_from_a_copy_of_it():
    """A prompt's cache serves several continuations, as copies."""
    model, inputs = host("qwen2"), inputs_of("qwen2", length=20)
    prompt = RotatedQuantCache(config=model.config, **EAGER)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :-1], past_key_values=prompt)
    texts = []
    for _ in range(2):
        torch.manual_seed(0)
        cache = copy.deepcopy(prompt)
        run = generate(model, inputs, do_sample=True, past_key_values=cache)
        texts.append(run.text)
    assert torch.equal(*texts) and prompt.get_seq_length() == 19


def test_the_decoder_of_an_encoder_decoder_can_have_it():
    model, inputs = host("bart"), inputs_of("bart")
    del inputs["decoder_input_ids"]
    cache = EncoderDecoderCache(RotatedQuantCache(**FINE), DynamicCache())
    run, expected = generate(model, inputs, past_key_values=cache), generate(model, inputs)
    assert torch.equal(run.text, expected.text)
    assert cache.self_attention_cache.memory()["packed_tokens"] == 10


@pytest.mark.parametrize("rows", [[1, 0, 1], [2]], ids=str)
@pytest.mark.parametrize("codec", ["rotated", "reference"])
def test_rows_move_with_their_codes(codec, rows):
    cache = filled(30, batch=3, codec=codec, **EAGER)
    before = read(cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor(rows))
    cache.batch_repeat_interleave(2)
    chosen = torch.tensor([2, 0, 1])[rows].repeat_interleave(2)
    for was, now in zip(before, read(cache), strict=True):
        torch.testing.assert_close(now, was[chosen])


@pytest.mark.parametrize("removed", [1, 3, 10, 30])
def test_a_crop_leaves_the_tokens_before_as_they_were(removed):
    """From the plain tokens only, into the codes, and all of them."""
    cache = filled(30, **EAGER)
    before = read(cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 30 - removed
    for was, now in zip(before, read(cache), strict=True):
        torch.testing.assert_close(now, was[:, :, : 30 - removed])


def test_a_crop_frees_what_it_takes_away():
    cache = filled(300, min_length=0)
    cache.crop(-200)
    assert cache.memory()["bytes"] == 2 * HEADS * 34 * 100 + WIDTH * WIDTH * 4


def test_a_cache_is_empty_after_a_reset():
    cache = filled(30, **EAGER)
    expected = read(cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory()["bytes"] == 0
    cache.update(*states(30), 0)
    for was, now in zip(expected, read(cache), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("law", ["force", "power"])
def test_four_bits_cost_gravity_about_what_they_cost_the_host(law):
    """A distance holds the key's error twice, in |k|^2 and in q.k."""
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = inputs_of("qwen2", length=48)["input_ids"]

    def error(model) -> float:
        cache = RotatedQuantCache(config=model.config, **EAGER)
        with torch.no_grad():
            exact = model(ids).logits
            model(ids[:, :40], past_key_values=cache)
            rough = model(ids[:, 40:], past_key_values=cache).logits
        return float((rough - exact[:, 40:]).norm() / exact[:, 40:].norm())

    of_gravity = error(gravity_host("qwen2", GravityConfig(law=law), **wide))
    assert 0.005 < of_gravity < 2 * error(host("qwen2", **wide))


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention": "gravity"}, {"exit_threshold": 0.5}, {"feed_forward_policy": "block"}],
    ids=str,
)
def test_a_leanformer_generates_from_it(settings):
    torch.manual_seed(0)
    config = LeanFormerConfig(
        **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
        **{"intermediate_size": 64, "attention_rank": 8, "feed_forward_rank": 8, "screen_dim": 4},
        **{"attention_top_k": 12, "local_window": 4, "sink_tokens": 1, "gate_rank": 4},
        **{"feed_forward_block": 8, "min_depth": 1, "tie_word_embeddings": False, **settings},
    )
    model, inputs = LeanFormerForCausalLM(config).eval(), left_padded("qwen2", length=20)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cache = RotatedQuantCache(config=config, **FINE)
    text = model.generate(**inputs, **options, past_key_values=cache)
    assert torch.equal(text, model.generate(**inputs, **options))
    assert cache.memory()["packed_tokens"] == 24


def test_sparse_attention_of_a_host_chooses_among_what_is_read():
    model, ids = host("qwen2"), inputs_of("qwen2", length=40)["input_ids"]
    sparsify_attention(model, KeyBudget(top_k=12, block_size=2, window=4, sinks=1))
    cache, plain = RotatedQuantCache(config=model.config, **EAGER), DynamicCache()
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        for index, layer in enumerate(copy.deepcopy(cache).layers):
            one = torch.zeros_like(layer.keys[:, :, :1]), torch.zeros_like(layer.values[:, :, :1])
            plain.update(*(x[:, :, :-1] for x in layer.update(*one)), index)
        given, expected = (model(ids[:, -1:], past_key_values=x).logits for x in (cache, plain))
        other = host("qwen2")(ids[:, -1:], past_key_values=plain).logits
    torch.testing.assert_close(given, expected)
    assert (other - expected).abs().max() > 0.1


def test_keys_that_need_a_gradient_are_refused_before_anything_changes():
    cache = filled(30, **EAGER)
    keys, values = states(4, 1)
    with pytest.raises(RuntimeError, match="without gradients"):
        cache.update(keys.requires_grad_(), values, 0)
    assert cache.get_seq_length() == 30


def test_the_published_codec_takes_a_byte_for_each_code_and_writes_all_anew():
    cache = filled(4096, codec="reference", dtype=torch.bfloat16)
    assert isinstance(cache.layers[0], PublishedQuantLayer)
    assert 1 < cache.memory()["ratio"] < 2
    before = cache.layers[0].packed[0].clone()
    cache.update(*(100 * x.bfloat16() for x in states(200, 1)), 0)
    assert not torch.equal(before, cache.layers[0].packed[0][:, : before.shape[1]])
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(-1)


@pytest.mark.parametrize(
    "wrong",
    [{"nbits_k": 3}, {"nbits_v": 16}, {"group": 0}, {"residual": 1}, {"min_length": -1},
     {"ranges": "float"}, {"codec": "published"}],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"RotatedQuantCache\.{name}: expected"):
        RotatedQuantCache(**wrong)


def test_a_model_without_full_attention_is_refused():
    with pytest.raises(ValueError, match="nothing would be packed"):
        RotatedQuantCache(config=host("mistral").config)


def test_a_positive_crop_is_refused():
    with pytest.raises(ValueError, match="expected a negative number"):
        filled(30, **EAGER).crop(4)
