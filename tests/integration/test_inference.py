"""What a patched model must share with any model: causality, padding, caches, packing, compile."""

from __future__ import annotations

import pytest
import torch
from hosts import DECODERS, VOCABULARY, logits, tiny_host, tiny_inputs

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.ops.reference import visible_keys

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def gravity_host(family: str, **overrides) -> torch.nn.Module:
    """Patched and calibrated at softness 1, so that attention is neither uniform nor a lookup."""
    model = patch_with_gravity(tiny_host(family, **overrides))
    calibrate(model, [tiny_inputs(family)])
    return model


@pytest.mark.parametrize("family", DECODERS)
def test_the_last_token_changes_no_earlier_row(family):
    """F1: without a mask function of our own, transformers hands over no mask at all."""
    model, inputs = gravity_host(family), tiny_inputs(family)
    before = logits(model, inputs)
    inputs["input_ids"][:, -1] = (inputs["input_ids"][:, -1] + 1) % VOCABULARY
    after = logits(model, inputs)
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("mask_kind", ["none", "padded", "packed"])
def test_attention_is_always_told_what_is_hidden(mask_kind, monkeypatch):
    """F2: the three mask builders of transformers disagree on kind and on None."""
    import gravity_hf.integration.attention as attention

    seen = []
    original = attention.gravity_attention

    def spy(*args, **kwargs):
        seen.append({word: kwargs[word] for word in ("causal", "window", "key_ranges")})
        assert kwargs["mask"] is None
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "gravity_attention", spy)
    model, inputs = patch_with_gravity(tiny_host("qwen2")), tiny_inputs("qwen2")
    if mask_kind == "none":
        inputs.pop("attention_mask")
    elif mask_kind == "padded":
        inputs["attention_mask"][0, :4] = 0
    else:
        inputs = {"input_ids": inputs["input_ids"][:1], "use_cache": False}
        inputs["position_ids"] = torch.tensor([[*range(6), *range(5)]])
    logits(model, inputs)
    visible = visible_keys(11, 11, **seen[0])[:, 0]
    expected = torch.ones(11, 11, dtype=torch.bool).tril().expand_as(visible).clone()
    if mask_kind == "padded":
        expected[0, :, :4] = False
    if mask_kind == "packed":
        expected[0, 6:, :6] = False
    assert torch.equal(visible, expected)


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2"])
def test_static_cache_equals_dynamic_cache(family, padded):
    """F3: None means top-left causal to a cache that is longer than the prompt."""
    model, inputs = gravity_host(family), tiny_inputs(family)
    if padded:
        inputs["attention_mask"][0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    dynamic = model.generate(**inputs, **options)
    static = model.generate(**inputs, **options, cache_implementation="static")
    without = model.generate(**inputs, **options, use_cache=False)
    assert dynamic.shape[1] == 19
    assert torch.equal(static, dynamic) and torch.equal(without, dynamic)


@pytest.mark.parametrize("family", DECODERS)
def test_cached_decoding_equals_the_full_forward(family):
    model, inputs = gravity_host(family), tiny_inputs(family)
    full = logits(model, inputs)
    ids = inputs["input_ids"]
    with torch.no_grad():
        prompt = model(ids[:, :6], use_cache=True)
        rows, cache = [prompt.logits], prompt.past_key_values
        for step in range(6, ids.shape[1]):
            output = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            rows.append(output.logits)
    torch.testing.assert_close(torch.cat(rows, 1), full, **TOLERANCE)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding_equals_no_padding(family):
    model, inputs = gravity_host(family), tiny_inputs(family, batch=1)
    plain = logits(model, inputs)
    padding = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.cat([padding, inputs["attention_mask"]], 1)
    padded = {
        "input_ids": torch.cat([padding, inputs["input_ids"]], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    torch.testing.assert_close(logits(model, padded)[:, 5:], plain, **TOLERANCE)


def test_right_padding_equals_no_padding_for_an_encoder():
    model, inputs = gravity_host("bert"), tiny_inputs("bert", batch=1)
    plain = logits(model, inputs)
    padding = torch.zeros(1, 5, dtype=torch.long)
    padded = {key: torch.cat([value, padding], 1) for key, value in inputs.items()}
    torch.testing.assert_close(logits(model, padded)[:, :-5], plain, **TOLERANCE)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_packed_sequences_equal_separate_ones(family):
    """F4: packing is read from position_ids alone, and only where no cache is made."""
    model = gravity_host(family)
    one, two = (tiny_inputs(family, batch=1, length=n, seed=n)["input_ids"] for n in (6, 9))
    packed = {
        "input_ids": torch.cat([one, two], 1),
        "position_ids": torch.tensor([[*range(6), *range(9)]]),
    }
    together = logits(model, packed, use_cache=False)
    apart = [logits(model, {"input_ids": ids}) for ids in (one, two)]
    torch.testing.assert_close(together, torch.cat(apart, 1), **TOLERANCE)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_gradient_checkpointing_changes_no_gradient(implementation):
    def gradients(checkpointing):
        model = tiny_host("qwen2")
        patch_with_gravity(model, GravityConfig(implementation=implementation)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = tiny_inputs("qwen2")
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain["model.layers.0.self_attn.gravity.mass_log"].abs().max() > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_compiled_fullgraph_equals_eager_in_values_and_gradients(implementation):
    model = tiny_host("qwen2", num_hidden_layers=2)
    patch_with_gravity(model, GravityConfig(implementation=implementation))
    calibrate(model, [tiny_inputs("qwen2")])
    inputs = tiny_inputs("qwen2")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for runner in (model, compiled):
        model.zero_grad()
        output = runner(**inputs, labels=inputs["input_ids"], use_cache=False)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((output.logits.detach(), gradients))
    (eager_logits, eager), (compiled_logits, under_compile) = results
    torch.testing.assert_close(compiled_logits, eager_logits, **TOLERANCE)
    for name, gradient in eager.items():
        torch.testing.assert_close(under_compile[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_compiled_model_takes_other_lengths_without_breaking_its_graph():
    model = gravity_host("qwen2", num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (11, 17, 23, 5):
        inputs = tiny_inputs("qwen2", length=length)
        torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(dtype):
    model, inputs = gravity_host("qwen2"), tiny_inputs("qwen2")
    exact = logits(model, inputs)
    host_exact = logits(tiny_host("qwen2"), inputs)
    host_error = (logits(tiny_host("qwen2").to(dtype), inputs) - host_exact).abs().max()
    half = tiny_host("qwen2").to(dtype)
    patch_with_gravity(half)
    calibrate(half, [inputs])
    error = (logits(half, inputs) - exact).abs().max()
    assert error <= 3 * host_error


def test_output_attentions_gives_the_weights():
    model, inputs = gravity_host("bert"), tiny_inputs("bert")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 3
    for weights in attentions:
        assert weights.shape == (2, 6, 11, 11)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 11))


def test_assisted_and_beam_generation_run_on_a_patched_model():
    model, inputs = gravity_host("qwen2"), tiny_inputs("qwen2", batch=1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(**inputs, **options)
    assisted = model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, assisted)
    assert model.generate(**inputs, **options, num_beams=2).shape == greedy.shape


def test_continuous_batching_outside_its_context_names_the_context():
    model = patch_with_gravity(tiny_host("qwen2"))
    with pytest.raises(ValueError, match=r"gravity_serving\(model\)"):
        model.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert"])
def test_a_gpu_gives_what_the_cpu_gives(family, dtype):
    """Patching, calibration, padding and the backward on CUDA; bfloat16 within its rounding."""
    inputs = tiny_inputs(family)
    inputs["attention_mask"][0, -3:] = 0
    exact = logits(gravity_host(family), inputs)
    model = patch_with_gravity(tiny_host(family).to("cuda", dtype))
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    calibrate(model, [{name: tensor.cuda() for name, tensor in tiny_inputs(family).items()}])
    error = (logits(model, on_gpu).float().cpu() - exact)[inputs["attention_mask"].bool()]
    assert error.abs().max() <= (1e-3 if dtype == torch.float32 else 0.2) * exact.abs().max()
    model.train()(**on_gpu, labels=on_gpu["input_ids"]).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "mass_log" in name]
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


@pytest.mark.gpu
def test_generation_on_a_gpu_is_the_same_with_every_cache():
    model = gravity_host("qwen2").cuda()
    inputs = {name: tensor.cuda() for name, tensor in tiny_inputs("qwen2").items()}
    inputs["attention_mask"][0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    dynamic = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), dynamic)
    static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static, dynamic)
