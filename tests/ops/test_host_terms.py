"""`softcap` and `sinks`, what patched hosts bring along: the definition, the limit in which they
are the host's, and the chunked implementation."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_within_budget
from ops.operator_cases import (
    cast,
    make_inputs,
    packed_ranges,
    padding_ranges,
    run,
    values_and_gradients,
)

from gravity_hf.ops import blocks, gravity_attention
from gravity_hf.ops.chunked import gravity_attention_chunked
from gravity_hf.ops.intervals import Intervals
from gravity_hf.ops.reference import gravity_attention_reference, visible_keys

# Caps near the spread of the scores, where they bend most.
TERMS = {
    "softcap": ({}, {"softcap": 0.15}),
    "sinks": ({"sinks": "head"}, {}),
    "row_sinks": ({"sinks": "row"}, {}),
    "both": ({"sinks": "head"}, {"softcap": 0.15}),
}
RULES = {
    "all": {},
    "mask": {"causal": True, "mask": True},
    "window": {"causal": True, "window": 3},
    "ranges": {"key_ranges": padding_ranges(2, 11, "left")},
}
EVERY_TERM = pytest.mark.parametrize(("given", "options"), TERMS.values(), ids=TERMS)
LAW_AND_DISTANCE = pytest.mark.parametrize(
    ("law", "lifted"), [(law, lifted) for law in ("force", "power") for lifted in (False, True)]
)


def float_mask(queries, keys):
    """`[2, 4, Tq, Tk]`: added here, hidden there, and one row in which everything is hidden."""
    mask = torch.randn(2, 4, queries, keys, generator=torch.Generator().manual_seed(1)).double()
    mask[mask > 1.0] = torch.finfo(torch.float64).min
    mask[0, 1, 2] = -math.inf
    return mask


def rules_of(rule, queries, keys):
    return {**RULES[rule], **({"mask": float_mask(queries, keys)} if "mask" in RULES[rule] else {})}


def dense(inputs, law, softcap=None, mask=None, **rules):
    """The definition once more, from coordinates: `sqrt(R^2 - |k|^2)` is one of a lifted key."""
    q, k, v = (inputs[name] for name in "qkv")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    mass, eps = (inputs[name][:, None, None] for name in ("mass", "eps"))
    origin = torch.zeros_like(k[:, :, :1])
    if "key_radius_sq" in inputs:
        radius_sq = inputs["key_radius_sq"].repeat_interleave(2)[:, None, None]
        height = (radius_sq - k.square().sum(-1, keepdim=True)).sqrt()
        k = torch.cat([k, height], -1)
        q = torch.cat([q, torch.zeros_like(q[..., :1])], -1)
        origin = torch.cat([origin, radius_sq.sqrt().expand_as(origin[..., :1])], -1)

    def law_at(distance_sq):
        softened = distance_sq + eps
        return mass**2 / softened if law == "force" else -(mass**2) * softened.log()

    def score_of(keys):
        return law_at((q[:, :, :, None] - keys[:, :, None]).square().sum(-1))

    score = score_of(k)
    if softcap is not None:
        neutral = law_at(q.square().sum(-1)[..., None] + k.square().sum(-1)[:, :, None])
        score = neutral + softcap * ((score - neutral) / softcap).tanh()
    seen = visible_keys(*score.shape[2:], **rules)
    seen = torch.ones_like(score, dtype=torch.bool) if seen is None else seen.expand_as(score)
    if mask is not None:
        seen = seen & (mask > -1e30)
        score = score + mask.masked_fill(mask < -1e30, 0.0)
    weights = score.exp() * seen
    total = weights.sum(-1, keepdim=True)
    if "sinks" in inputs:
        sinks = inputs["sinks"]
        sinks = sinks[:, None, None] if sinks.dim() == 1 else sinks[..., None]
        total = total + (score_of(origin) + sinks).exp()
    weights = weights / total.masked_fill(total == 0, 1.0)
    return weights @ v, weights


@pytest.mark.parametrize("rule", RULES)
@EVERY_TERM
@LAW_AND_DISTANCE
def test_the_reference_is_the_definition(law, lifted, given, options, rule):
    """Grouped heads, Dv != D, rows that see nothing. Weights leave the sink's out."""
    inputs = make_inputs(value_width=3, lifted=lifted, law=law, **given)
    rules = rules_of(rule, 9, 11)
    expected, weights = dense(inputs, law, **options, **rules)
    arguments = dict(inputs)
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "mass")]
    actual = gravity_attention_reference(*tensors, law=law, **arguments, **options, **rules)
    torch.testing.assert_close(actual.output, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(actual.weights, weights, rtol=1e-11, atol=1e-12)
    sums = actual.weights.sum(-1)
    if "sinks" in given:
        assert (sums < 1 - 1e-6).all()
    if "mask" in rules:
        assert (actual.output[0, 1, 2] == 0).all()
    plain = {name: x for name, x in inputs.items() if name != "sinks"}
    without = run(gravity_attention_reference, plain, law=law, **rules)
    assert (without - expected).abs().max() > 1e-3


@LAW_AND_DISTANCE
def test_the_reference_has_the_gradient_of_the_definition(law, lifted):
    shape = {"batch": 1, "heads": 2, "key_heads": 1, "queries": 3, "keys": 4, "width": 2}
    inputs = make_inputs(**shape, lifted=lifted, law=law, sinks="head")
    names = list(inputs)

    def function(*leaves):
        arguments = dict(zip(names, leaves, strict=True))
        return run(gravity_attention_reference, arguments, law=law, causal=True, softcap=0.4)

    torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def host_attention(q, k, v, scaling, softcap, sinks, causal):
    """A host's: capped products, and the sink's logit as one more column."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    logits = scaling * q @ k.mT
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if causal:
        seen = visible_keys(*logits.shape[2:], causal=True)
        logits = logits.masked_fill(~seen, -math.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand_as(logits[..., :1])], -1)
    return logits.softmax(-1)[..., : k.shape[2]] @ v


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("law", ["force", "power"])
@EVERY_TERM
def test_a_large_softening_gives_the_hosts_capped_logits_and_sinks(given, options, law, impl):
    """Lifted keys, with the masses of calibration: `M^2 = scaling n / 2` (power), `scaling n^2 / 2`
    (force), `n = eps` here. What is left over is of the order of `1 / eps`."""
    scaling, eps = 0.7, 1e7
    sinks = {"sinks": "head"} if "sinks" in given else {}
    inputs = make_inputs(lifted=True, law=law, **sinks)
    strength = scaling * eps / 2 if law == "power" else scaling * eps**2 / 2
    inputs["mass"] = torch.full((4,), strength**0.5).double()
    inputs["eps"] = torch.full((4,), eps).double()
    expected = host_attention(
        *(inputs[name] for name in "qkv"),
        scaling,
        options.get("softcap"),
        inputs.get("sinks"),
        causal=True,
    )
    actual = run(gravity_attention, inputs, law=law, causal=True, impl=impl, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["one_block", "many_blocks", "unread"])
def block_size(request, monkeypatch):
    """`unread`: as on a GPU, where the values of key ranges are not read to choose blocks."""
    if request.param != "one_block":
        monkeypatch.setitem(blocks.ELEMENTS, "cpu", 24)
        monkeypatch.setitem(blocks.ROWS_MASKED, "cpu", 4)
    if request.param == "unread":
        monkeypatch.setattr(Intervals, "_known", False)


def check_chunked(inputs, **options):
    expected = values_and_gradients(gravity_attention_reference, inputs, **options)
    actual = values_and_gradients(gravity_attention_chunked, inputs, **options)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-9, msg=name)


@EVERY_TERM
@LAW_AND_DISTANCE
def test_chunked_values_and_all_gradients(block_size, law, lifted, given, options):
    """Every rule, more queries than keys and fewer, and a collision, where d^2 is clamped."""
    for rule, (queries, keys) in zip(RULES, ((9, 11), (11, 9), (9, 9), (7, 11)), strict=True):
        inputs = make_inputs(
            queries=queries, keys=keys, value_width=5, lifted=lifted, law=law, **given
        )
        inputs["k"][:, :, 2] = inputs["q"][:, ::2, 3]
        check_chunked(inputs, law=law, **options, **rules_of(rule, queries, keys))


def test_chunked_clamped_distances_have_only_the_neutral_scores_gradient(block_size):
    """Keys longer than the radius: `|q|^2 + R^2 - 2 q.k` is negative for some pairs."""
    inputs = make_inputs(lifted=True, law="force", family="far", sinks="head")
    inputs["key_radius_sq"] = inputs["key_radius_sq"] * 0.2
    check_chunked(inputs, law="force", softcap=3.0)


@pytest.mark.parametrize("queries", [1, 3])
@EVERY_TERM
@LAW_AND_DISTANCE
def test_chunked_decoding_equals_the_reference(law, lifted, given, options, queries):
    inputs = make_inputs(queries=queries, lifted=lifted, law=law, **given)
    mask = torch.rand(2, 1, queries, 11, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, :, 0] = False
    for rules in ({"causal": True}, {"mask": mask}):
        with torch.no_grad():
            expected = run(gravity_attention_reference, inputs, law=law, **options, **rules)
            actual = run(gravity_attention_chunked, inputs, law=law, **options, **rules)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("law", ["force", "power"])
def test_chunked_caps_an_offset_of_thousands_without_losing_the_difference(law):
    """A calibrated head in float32: scores of thousands that differ by ones."""
    truth, peer, actual = {}, {}, {}
    for seed in range(6):
        inputs = make_inputs(
            queries=24, keys=24, width=16, lifted=True, law=law, sinks="head", seed=seed
        )
        inputs["eps"] = inputs["eps"] + 500.0
        strength = 250.0 if law == "power" else 250.0 * 500.0
        inputs["mass"] = torch.full((4,), strength**0.5).double()
        given = cast(inputs, torch.float32)
        doubles = {name: x.double() for name, x in given.items()}
        for results, implementation, tensors in (
            (truth, gravity_attention_reference, doubles),
            (peer, gravity_attention_reference, given),
            (actual, gravity_attention_chunked, given),
        ):
            options = {"law": law, "softcap": 5.0, "causal": True}
            for name, value in values_and_gradients(implementation, tensors, **options).items():
                results.setdefault(name, []).append(value)
    for name, values in truth.items():
        stacked = [torch.stack(x) for x in (actual[name], values, peer[name])]
        assert_within_budget(name, *stacked, factor=2.0 if name == "output" else 3.0)


@EVERY_TERM
def test_chunked_fullgraph_compile_equals_eager(given, options):
    torch._dynamo.reset()
    inputs = make_inputs(batch=1, queries=12, keys=12, law="power", lifted=True, **given)
    options = {**options, "law": "power", "key_ranges": packed_ranges(5, 7)}

    def function(*tensors, **arguments):
        return gravity_attention(*tensors, impl="chunked", **arguments)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(function, inputs, **options)
    actual = values_and_gradients(compiled, inputs, **options)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_dropout_reaches_no_sink():
    """Dropping keys' weights leaves the sink's share: the mean over draws is the plain output."""
    inputs = make_inputs(batch=1, heads=2, key_heads=1, queries=200, keys=40, sinks="head")
    inputs["v"] = torch.eye(40).double()[None, None]
    weights = run(gravity_attention_chunked, inputs)
    for implementation in (gravity_attention_reference, gravity_attention_chunked):
        torch.manual_seed(3)
        dropped = run(implementation, inputs, dropout_p=0.25)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
        assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / weights.numel()) ** 0.5


@pytest.mark.gpu
@EVERY_TERM
@LAW_AND_DISTANCE
def test_chunked_values_and_all_gradients_on_a_gpu(law, lifted, given, options):
    inputs = make_inputs(lifted=lifted, law=law, **given)
    options = {**options, "law": law, "causal": True, "mask": float_mask(9, 11)}
    expected = values_and_gradients(gravity_attention_reference, inputs, **options)
    options["mask"] = options["mask"].cuda()
    on_gpu = {name: x.cuda() for name, x in inputs.items()}
    actual = values_and_gradients(gravity_attention_chunked, on_gpu, **options)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].cpu(), value, rtol=1e-8, atol=1e-9, msg=name)
