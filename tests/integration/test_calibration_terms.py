"""Calibration of hosts whose attention has more terms, and of models with several sides."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hosts import logits, tiny_host, tiny_inputs

from gravity_hf import GravityConfig, calibrate, gravity_status, patch_with_gravity, unpatch_gravity
from gravity_hf.integration.closed_form import HeadGeometry
from gravity_hf.integration.observers import Agreement, Moments
from gravity_hf.integration.trials import Trials
from gravity_hf.layers.parameters import GravityTerms

LOWEST = torch.finfo(torch.float32).min
HEADS, KV_HEADS = 4, 2


@pytest.fixture
def call():
    """Queries, keys, and a mask that hides other keys from every head and all from one row."""
    q, k = torch.randn(2, HEADS, 5, 8), torch.randn(2, KV_HEADS, 7, 8)
    mask = torch.randn(2, HEADS, 5, 7)
    for head in range(HEADS):
        mask[:, head, :, head] = LOWEST
    mask[1, :, 3] = LOWEST
    return q, k, mask


def host_weights(q, k, mask, softcap, sinks):
    """float64 `[B, H, Tq, Tk]`: weights of a host, without the sink's; hidden rows: zeros."""
    dot = q.double() @ k.double().repeat_interleave(2, 1).mT
    score = 0.5 * dot
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = torch.where(mask > LOWEST / 2, score + mask, -math.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(*score.shape[:-1], 1)
        score = torch.cat([score, sink], -1)
    weights = score.softmax(-1)[..., :7].nan_to_num(0.0)
    return weights * (mask > LOWEST / 2).any(-1, keepdim=True), dot


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 1.0, 2.0])])
def test_moments_are_under_the_host_s_own_attention(call, softcap, sinks):
    seen = Moments()
    seen.see(*call, 0.5, softcap=softcap, sinks=sinks)
    weights, dot = host_weights(*call, softcap, sinks)
    visible = call[2] > LOWEST / 2
    torch.testing.assert_close(
        seen.sums["dot"], (weights * dot).sum((0, 2, 3)), rtol=1e-5, atol=1e-5
    )
    key_sq = call[1].double().square().sum(-1)
    attended = (weights * key_sq.repeat_interleave(2, 1)[:, :, None]).sum((0, 2, 3))
    torch.testing.assert_close(seen.sums["attended_key_sq"], attended, rtol=1e-5, atol=1e-5)
    # The sink is no key: neither its length nor its number is in the means.
    some = visible.any(2).unflatten(1, (KV_HEADS, 2)).any(2)
    torch.testing.assert_close(
        seen.sums["key_sq"], (key_sq * some).sum((0, 2)), rtol=1e-5, atol=1e-5
    )
    assert seen.keys.expand(KV_HEADS).tolist() == some.sum((0, 2)).tolist()
    assert seen.queries.expand(HEADS).tolist() == visible.any(-1).sum((0, 2)).tolist() == [9] * 4


@pytest.mark.parametrize("distance", ["lifted", "euclidean"])
@pytest.mark.parametrize("law", ["force", "power"])
def test_the_reported_divergence_has_caps_and_sinks_in_it(call, law, distance):
    q, k, mask = call
    sinks, softcap = torch.tensor([-1.0, 0.0, 1.0, 2.0]), 0.7
    mass, softening = torch.rand(HEADS) * 6 + 6, torch.rand(HEADS) + 20
    radius_sq = torch.full((KV_HEADS,), 30.0) if distance == "lifted" else None
    terms = GravityTerms(mass, softening, radius_sq)
    seen = Agreement(terms, law, torch.full((HEADS,), 200.0, dtype=torch.float64))
    seen.see(q, k, mask, 0.5, softcap=softcap, sinks=sinks)

    query_sq = q.double().square().sum(-1)[..., None]
    keys = torch.cat([k, torch.zeros(2, KV_HEADS, 1, 8)], 2).double().repeat_interleave(2, 1)
    kappa = keys.square().sum(-1)[:, :, None] if radius_sq is None else torch.tensor(30.0)
    dot = q.double() @ keys.mT
    eps, strength = softening.double()[:, None, None], mass.double().square()[:, None, None]

    def score(distance_sq):
        x = distance_sq + eps
        return strength / x if law == "force" else -strength * x.log()

    neutral = score(query_sq + kappa)
    gravity = neutral + softcap * torch.tanh(
        (score(query_sq + kappa - 2 * dot) - neutral) / softcap
    )
    host = softcap * torch.tanh(0.5 * dot / softcap)
    sink = sinks.double()[None, :, None, None].expand(2, HEADS, 5, 1)
    bias = torch.cat([mask.double(), sink], -1)
    visible = bias > LOWEST / 2
    p, g = ((x + bias).masked_fill(~visible, LOWEST).log_softmax(-1) for x in (host, gravity))
    rows = visible[..., :7].any(-1)
    kl = ((p.exp() * (p - g)).sum(-1) * rows).sum((0, 2)) / rows.sum((0, 2))
    torch.testing.assert_close(seen.divergence(), kl, rtol=1e-3, atol=1e-6)
    assert seen.histogram.sum(-1).tolist() == visible[..., :7].sum((0, 2, 3)).tolist()


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_trials_know_caps_sinks_and_heads_that_see_different_keys(call, softcap):
    """Against the report's own measure, which is held to the definition above."""
    q, k, mask = call
    sinks = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    center = torch.full((HEADS,), 12.0, dtype=torch.float64)
    reach = torch.full((HEADS,), 200.0, dtype=torch.float64)
    geometry = HeadGeometry(center, torch.ones_like(center), None, reach, 0.5)
    softening = torch.full((1, HEADS), 20.0, dtype=torch.float64)
    wanted = torch.tensor([[True, False, True, True]])
    trials = Trials(geometry, "force", softening, torch.ones_like(softening), wanted)
    trials.see(q, k, mask, 0.5, softcap=softcap, sinks=sinks)
    mass = geometry.mass(softening[0], "force").float()
    report = Agreement(GravityTerms(mass, softening[0].float(), None), "force", reach)
    report.see(q, k, mask, 0.5, softcap=softcap, sinks=sinks)
    found = trials.sums[0, 0] / trials.rows
    torch.testing.assert_close(
        found[wanted[0]], report.divergence()[wanted[0]], rtol=1e-3, atol=1e-6
    )
    assert found[1] == 0
    # The slope in s, where M^2 is s times the closed form's.
    step, sides = 1e-2, []
    for sign in (1, -1):
        strength = torch.full_like(softening, 1 + sign * step)
        beside = Trials(geometry, "force", softening, strength, wanted)
        beside.see(q, k, mask, 0.5, softcap=softcap, sinks=sinks)
        sides.append(beside.sums[0, 0])
    slope = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(trials.sums[1, 0], slope, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("how", [{"fit": True}, {"max_kl": 0.01}])
@pytest.mark.parametrize("peculiarity", ["a cap on the scores", "attention sinks"])
def test_fits_come_closer_than_the_closed_form(peculiarity, how):
    inputs = tiny_inputs(peculiarity)
    closed = calibrate(patch_with_gravity(tiny_host(peculiarity)), [inputs])
    fitted = calibrate(patch_with_gravity(tiny_host(peculiarity)), [inputs], **how)
    if "fit" in how:
        assert fitted.summary()["kl_mean"] < closed.summary()["kl_mean"]
    else:
        assert fitted.summary()["kl_max"] <= 1.001 * how["max_kl"]
        assert fitted.summary()["softness_median"] < 64.0


def test_padding_of_either_side_teaches_nothing():
    """The decoder's rows are counted by the decoder's mask, not by the encoder's."""
    name = "cross attention"
    inputs = tiny_inputs(name, batch=1)
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    padding = torch.zeros(1, 4, dtype=torch.long)
    longer = {key: torch.cat([value, padding], 1) for key, value in inputs.items()}
    plain = calibrate(patch_with_gravity(tiny_host(name)), [inputs])
    padded = calibrate(patch_with_gravity(tiny_host(name)), [longer])
    for a, b in zip(plain.rows, padded.rows, strict=True):
        for key in ("mean_distance", "mass", "softening", "contrast"):
            assert math.isclose(a[key], b[key], rel_tol=1e-4), (a["layer"], key)


def clip():
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 97, "eos_token_id": 2},
        vision_config={**tower, "image_size": 16, "patch_size": 4},
    )
    return transformers.CLIPModel(config).eval()


class TextTower(transformers.CLIPModel):
    """Called with text only, as a multimodal model may be."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.get_text_features(input_ids=input_ids, attention_mask=attention_mask)


def test_a_tower_that_no_batch_reaches_is_named_and_can_be_left_out():
    model, inputs = clip(), tiny_inputs("qwen2")
    model.__class__ = TextTower
    patch_with_gravity(model)
    with pytest.raises(ValueError) as error:
        calibrate(model, [inputs])
    message = str(error.value)
    assert "2 of 4 saw none: vision_model.encoder.layers.*.self_attn" in message
    advice = "GravityConfig(layers=(*range(0, 2),))"
    assert advice in message
    patch_with_gravity(unpatch_gravity(model), GravityConfig(layers=(*range(0, 2),)))
    assert len(calibrate(model, [inputs]).rows) == 8
    assert len(gravity_status(model).layers) == 2


@pytest.mark.parametrize("scaling", [0.05, 1.0])
def test_the_scaling_is_each_call_s_own(scaling):
    """A config's scaling must reach the masses: at a large softness the host comes back."""
    host = tiny_host("scaling from the config", attention_multiplier=scaling)
    inputs = tiny_inputs("scaling from the config")
    before = logits(host, inputs)
    calibrate(patch_with_gravity(host), [inputs], softness=256.0)
    assert (logits(host, inputs) - before).abs().max() < 0.02 * before.abs().max()
