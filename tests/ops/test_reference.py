"""The definition against the law written out in plain Python, and its derivatives."""

import itertools
import math

import pytest
import torch
from ops.operator_cases import (
    BATCH_TERMS,
    TERMS,
    make_inputs,
    packed_ranges,
    padding_ranges,
    run,
)

from gravity_hf.ops.reference import gravity_attention_reference, gravity_score

LAW_AND_DISTANCE = [(law, lifted) for law in ("force", "power") for lifted in (False, True)]


def distance_by_hand(inputs, n, h, i, j):
    g = h // (inputs["q"].shape[1] // inputs["k"].shape[1])
    query, key = inputs["q"][n, h, i].tolist(), inputs["k"][n, g, j].tolist()
    if "key_radius_sq" not in inputs:
        return sum((x - y) ** 2 for x, y in zip(query, key, strict=True))
    dot = sum(x * y for x, y in zip(query, key, strict=True))
    return max(sum(x * x for x in query) + inputs["key_radius_sq"][g].item() - 2 * dot, 0.0)


def score_by_hand(
    inputs, n, h, i, j, law, *, repulsive=False, max_force=None, force_cap="clamp", cutoff=None,
    curvature=None,
):  # fmt: skip
    """One scalar, from the law's text; None: a hard cutoff hides the pair."""
    a = inputs["query_mass"][n, h, i].item() if "query_mass" in inputs else 1.0
    b = inputs["key_mass"][n, h, j].item() if "key_mass" in inputs else 1.0
    strength, d2 = inputs["mass"][h].item() ** 2, None
    if "inverse_distance" not in inputs:
        d2 = distance_by_hand(inputs, n, h, i, j)
        distance = d2
        if curvature is not None:
            angle = math.sqrt(d2 + curvature.horizon)
            distance = max(d2 * (1 + curvature.kappa * math.cos(angle)), curvature.horizon)
        inverse = 1 / (distance + inputs["eps"][h].item())
    else:
        table = inputs["inverse_distance"]
        inverse = (table[n, 0] if table.dim() == 4 else table)[i, j].item()
    if law == "power":
        score = strength * math.log(inverse) + math.log(b)
    else:
        score = -strength * inverse if repulsive else strength * inverse
        score += inputs["head_bias"][h].item() if "head_bias" in inputs else 0.0
        score *= a * b
        if max_force is not None:
            smooth = force_cap == "tanh"
            score = max_force * math.tanh(score / max_force) if smooth else min(score, max_force)
    if cutoff is None:
        return score
    radius_sq = inputs["radius"][h].item() ** 2
    if cutoff == "hard":
        return None if d2 > radius_sq else score
    if cutoff == "soft":
        return score * max(0.0, 1 - d2 / radius_sq)
    return score - math.log1p(math.exp(-(radius_sq - d2)))


def by_hand(inputs, law, allowed, bias, *, exclude_self=False, **terms):
    """One row at a time."""
    batch, heads, queries, keys = bias.shape
    groups = heads // inputs["v"].shape[1]
    rows = []
    for n, h, i in itertools.product(range(batch), range(heads), range(queries)):
        scores = {}
        for j in range(keys):
            score = score_by_hand(inputs, n, h, i, j, law, **terms)
            if score is not None and allowed[n, h, i, j]:
                scores[j] = score + bias[n, h, i, j].item()
        own = i + keys - queries
        if exclude_self and len(scores) > 1:
            scores.pop(own, None)
        row = torch.zeros(inputs["v"].shape[-1]).double()
        if scores:
            top = max(scores.values())
            weights = {j: math.exp(s - top) for j, s in scores.items()}
            for j, weight in weights.items():
                row += weight / sum(weights.values()) * inputs["v"][n, h // groups, j]
        rows.append(row)
    return torch.stack(rows).view(batch, heads, queries, -1)


@pytest.mark.parametrize("token_masses", [False, True], ids=["plain", "token_masses"])
@pytest.mark.parametrize(("law", "lifted"), LAW_AND_DISTANCE)
def test_reference_is_the_law(law, lifted, token_masses):
    """Grouped heads, Dv != D, a collision, a hidden row, a float mask on top of causality."""
    inputs = make_inputs(
        queries=5, keys=7, value_width=3, lifted=lifted, law=law, token_masses=token_masses
    )
    inputs["k"][:, :, 2] = inputs["q"][:, ::2, 3]
    bias = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)).double()
    bias[0, 1, 2] = torch.finfo(torch.float64).min
    bias[1, 0, 4, 1] = -math.inf
    allowed = (bias > -1e30) & (torch.arange(7) <= torch.arange(5)[:, None] + 2)
    expected = by_hand(inputs, law, allowed, bias)
    actual = run(gravity_attention_reference, inputs, law=law, mask=bias, causal=True)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (actual[0, 1, 2] == 0).all()


@pytest.mark.parametrize(("law", "lifted"), LAW_AND_DISTANCE)
def test_reference_gradients_are_the_derivatives(law, lifted):
    """F16: gradcheck of every input, with grouped heads, Dv != D, a hidden row and k = q."""
    inputs = make_inputs(
        batch=1, heads=2, key_heads=1, queries=3, keys=4, width=3, value_width=2,
        lifted=lifted, law=law, token_masses=True,
    )  # fmt: skip
    if not lifted:
        # The exact collision d2 = 0 is the edge of the clamp: in one direction, at least, the
        # squared distance is smooth there, but rounding may put it on the wrong side.
        inputs["k"][0, 0, 0] = inputs["q"][0, 0, 0] = torch.tensor([1.0, 2.0, -4.0])
    mask = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(2)).double()
    mask[0, 0, 1] = -math.inf
    gradcheck(inputs, law=law, mask=mask, atol=2e-5)


def gradcheck(inputs, *, atol=1e-5, **options):
    """Of every input."""
    names = list(inputs)

    def function(*leaves):
        arguments = dict(zip(names, leaves, strict=True))
        return run(gravity_attention_reference, arguments, **options)

    torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()], atol=atol)


CASES = {**TERMS, **BATCH_TERMS}
ALL_TERMS = pytest.mark.parametrize(("given", "options"), CASES.values(), ids=CASES)


@ALL_TERMS
def test_every_term_is_in_the_law(given, options):
    """Against plain Python, with token masses, grouped heads and a float mask under causality."""
    law = given.get("law", "force")
    inputs = make_inputs(queries=5, keys=7, value_width=3, token_masses=True, **given)
    bias = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)).double()
    # This row sees nothing but itself: `exclude_self` leaves it that.
    bias[1, 2, 3, :5] = bias[1, 2, 3, 6:] = -math.inf
    allowed = (bias > -1e30) & (torch.arange(7) <= torch.arange(5)[:, None] + 2)
    expected = by_hand(inputs, law, allowed, bias, **options)
    actual = run(gravity_attention_reference, inputs, law=law, mask=bias, causal=True, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in CASES if "hard" not in name and name != "ngt"])
def test_every_term_has_the_gradient_of_the_law(name):
    """Hard cutoffs have another one on purpose: see below."""
    given, options = CASES[name]
    shape = {"batch": 2, "heads": 2, "key_heads": 1, "queries": 3, "keys": 4, "width": 2}
    inputs = make_inputs(**shape, value_width=2, token_masses=True, **given)
    gradcheck(inputs, law=given.get("law", "force"), causal=True, **options)


@pytest.mark.parametrize("law", ["force", "power"])
def test_a_hard_cutoff_hides_and_lends_the_gradient_of_its_soft_edge(law):
    """D1: the forward pass of a mask; the gradient of `logsigmoid` added and held at 0."""
    inputs = make_inputs(radius=True, law=law, token_masses=True)
    options = {"law": law, "causal": True}
    k = inputs["k"].repeat_interleave(2, 1)
    distance_sq = (inputs["q"][:, :, :, None] - k[:, :, None]).square().sum(-1)
    inside = inputs["radius"].square()[:, None, None] - distance_sq
    assert 0.2 < (inside >= 0).double().mean() < 0.8
    plain = {name: x for name, x in inputs.items() if name != "radius"}
    expected = run(gravity_attention_reference, plain, mask=inside >= 0, **options)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output = run(gravity_attention_reference, leaves, cutoff="hard", width=2.0, **options)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)

    held = (-torch.nn.functional.logsigmoid(inside / 2)).masked_fill(inside < 0, -math.inf)
    surrogate = run(
        gravity_attention_reference, leaves, cutoff="log", width=2.0, mask=held, **options
    )
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).double()
    actual, wanted = (
        torch.autograd.grad(x, list(leaves.values()), direction) for x in (output, surrogate)
    )
    for name, x, y in zip(leaves, actual, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10, msg=name)
    radius = list(leaves).index("radius")
    assert (actual[radius] != 0).all()


def test_a_soft_cutoff_hides_nothing():
    """D3: outside the radius the score is 0, the published form."""
    inputs = make_inputs(radius=True)
    inputs["radius"] = torch.full_like(inputs["radius"], 1e-3)
    expected = inputs["v"].mean(2, keepdim=True).repeat_interleave(2, 1)
    actual = run(gravity_attention_reference, inputs, cutoff="soft")
    torch.testing.assert_close(actual, expected.expand_as(actual))


def test_max_force_has_gradient_one_at_equality_and_none_above():
    table = torch.tensor([[1.0, 2.0, 3.0]]).double().requires_grad_()
    v = torch.eye(3).double()[None, None]
    output = gravity_attention_reference(
        None, None, v, torch.ones(1).double(), eps=None, inverse_distance=table, max_force=2.0
    ).output
    output[0, 0, 0, 0].backward()
    w = output.detach()[0, 0, 0]
    torch.testing.assert_close(
        table.grad[0], torch.stack([w[0] - w[0] ** 2, -w[0] * w[1], w[0] * 0])
    )


def visible_by_hand(queries, keys, causal, window, ranges):
    """`[B|1][Tq][Tk]` of Python bools."""
    shape = (1, 1) if ranges is None else ranges.shape[:2]
    rows = []
    for n in range(shape[0]):
        for i, j in itertools.product(range(queries), range(keys)):
            p = i + keys - queries
            seen = not causal or j <= p
            if window is not None:
                seen = seen and (p - j if causal else abs(p - j)) < window
            if ranges is not None:
                start, stop = ranges[n, i if shape[1] > 1 else 0].tolist()
                seen = seen and start <= j < stop
            rows.append(seen)
    return torch.tensor(rows).view(shape[0], 1, queries, keys)


RANGES = {
    "none": None,
    "packed": packed_ranges(3, 1, 3),
    "left": padding_ranges(2, 9, "left"),
    "right": padding_ranges(2, 9, "right"),
}


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_positions_hide_what_the_rules_say(ranges, causal, window):
    inputs = make_inputs(queries=7, keys=9)
    mask = visible_by_hand(7, 9, causal, window, ranges)
    rules = {"causal": causal, "window": window, "key_ranges": ranges}
    expected = run(gravity_attention_reference, inputs, mask=mask)
    assert torch.equal(run(gravity_attention_reference, inputs, **rules), expected)


def test_hidden_row_gives_zeros_and_finite_gradients():
    inputs = {name: x.requires_grad_() for name, x in make_inputs().items()}
    mask = torch.ones(9, 11, dtype=torch.bool)
    mask[4] = False
    output = run(gravity_attention_reference, inputs, mask=mask)
    assert (output[:, :, 4] == 0).all()
    output.sum().backward()
    for name, leaf in inputs.items():
        assert leaf.grad.isfinite().all(), name
    assert (inputs["q"].grad[:, :, 4] == 0).all()


@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_steepest_slope_and_largest_score_of_the_force_law(eps):
    """F17: slope in distance 3 sqrt(3)/8 M^2/eps^1.5, score M^2/eps: why eps has a floor."""
    distance = torch.linspace(0, 5, 200_001, dtype=torch.float64, requires_grad=True)
    mass, softening = torch.tensor([1.3]).double(), torch.tensor([eps]).double()
    score = gravity_score(distance.square()[None, None, None], mass, softening, "force")
    slope = torch.autograd.grad(score.sum(), distance)[0]
    assert slope.abs().max().item() == pytest.approx(
        3 * math.sqrt(3) / 8 * 1.3**2 / eps**1.5, rel=1e-4
    )
    assert score.max().item() == pytest.approx(1.3**2 / eps)


def test_autocast_leaves_the_definition_in_float32():
    """F16: under autocast a plain product would be rounded to bfloat16."""
    inputs = {
        name: value.float() if isinstance(value, torch.Tensor) else value
        for name, value in make_inputs(family="near", queries=40, keys=40, width=64).items()
    }
    expected = run(gravity_attention_reference, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(gravity_attention_reference, inputs), expected)
