"""A patched model agrees with a plain loop written from the law, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs

from gravity_hf import GravityConfig, calibrate, patch_with_gravity


def attend(q, k, v, mass, eps, radius_sq, law, visible):
    """The law for one head: lists of float64 vectors in, list of outputs out."""
    rows = []
    for i, query in enumerate(q):
        scores = {}
        for j, key in enumerate(k):
            if not visible(i, j):
                continue
            kappa = float(key @ key) if radius_sq is None else radius_sq
            distance_sq = max(float(query @ query) + kappa - 2.0 * float(query @ key), 0.0)
            if law == "force":
                scores[j] = mass**2 / (distance_sq + eps)
            else:
                scores[j] = -(mass**2) * math.log(distance_sq + eps)
        if not scores:
            rows.append(torch.zeros_like(v[0]))
            continue
        top = max(scores.values())
        weights = {j: math.exp(s - top) for j, s in scores.items()}
        total = sum(weights.values())
        rows.append(sum(weight / total * v[j] for j, weight in weights.items()))
    return torch.stack(rows)


def loop_forward(model, ids, mask):
    """Qwen2's forward in float64 with the loop as its attention."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    gravity = model.config.gravity
    core = model.model
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = core.embed_tokens(ids)
    cos, sin = core.rotary_emb(hidden, positions)
    for layer in core.layers:
        attention, state = layer.self_attn, layer.self_attn.gravity.state_dict()
        normed = layer.input_layernorm(hidden)
        heads = (*normed.shape[:2], -1, attention.head_dim)
        q, k, v = (
            projection(normed).view(heads).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        outputs = torch.zeros_like(q)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                kv = h // attention.num_key_value_groups
                mass = math.log1p(math.exp(float(state["mass_log"][h])))
                eps, radius_sq = gravity["epsilon"], None
                if gravity["learn_softening"]:
                    eps = math.log1p(math.exp(float(state["softening_log"][h])))
                if gravity["distance"] == "lifted":
                    radius_sq = float(state["key_radius_sq"][kv])
                outputs[b, h] = attend(
                    q[b, h], k[b, kv], v[b, kv], mass, eps, radius_sq, gravity["law"],
                    lambda i, j, b=b: j <= i and bool(mask[b, j]),
                )  # fmt: skip
        merged = outputs.transpose(1, 2).reshape(*normed.shape[:2], -1)
        hidden = hidden + attention.o_proj(merged)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(core.norm(hidden))


@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("softness", [None, 0.0, 1.0])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_a_patched_model_agrees_with_the_float64_loop(law, softness, padded):
    model = tiny_host("qwen2", initializer_range=0.1)
    patch_with_gravity(model, GravityConfig(law=law))
    inputs = tiny_inputs("qwen2", length=8)
    if softness is not None:
        calibrate(model, [inputs], softness=softness)
    if padded:
        inputs["attention_mask"][0, :3] = 0
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    once = logits(model, inputs)
    cached = cached_logits(model, inputs)

    double = tiny_host("qwen2", initializer_range=0.1)
    patch_with_gravity(double, GravityConfig(law=law))
    if softness is not None:
        calibrate(double, [tiny_inputs("qwen2", length=8)], softness=softness)
    double = double.double()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact = loop_forward(double, inputs["input_ids"], inputs["attention_mask"])

    real = inputs["attention_mask"].bool()
    assert exact.abs().max() > 1.0
    for actual in (once, cached):
        assert (actual.double() - exact)[real].abs().max() <= 1e-5


def cached_logits(model, inputs, prompt=5):
    """The same logits from a prompt and then one token at a time."""
    rows, cache = [], None
    length = inputs["input_ids"].shape[1]
    steps = [(0, prompt), *((i, i + 1) for i in range(prompt, length))]
    with torch.no_grad():
        for start, end in steps:
            options = {"attention_mask": inputs["attention_mask"][:, :end]}
            if "position_ids" in inputs:
                options["position_ids"] = inputs["position_ids"][:, start:end]
            output = model(
                inputs["input_ids"][:, start:end], past_key_values=cache, use_cache=True, **options
            )
            cache = output.past_key_values
            rows.append(output.logits)
    return torch.cat(rows, 1)
