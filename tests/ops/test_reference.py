"""The definition against the law written out in plain Python, and its derivatives."""

import math

import pytest
import torch
from ops.operator_cases import LEAVES, make_inputs, run

from gravity_hf.ops.reference import gravity_attention_reference, gravity_score

LAW_AND_DISTANCE = [(law, lifted) for law in ("force", "power") for lifted in (False, True)]


def by_hand(inputs, law, allowed, bias):
    """One scalar at a time, from the law's text."""
    q, k, v, mass, eps = (inputs[name].tolist() for name in ("q", "k", "v", "mass", "eps"))
    radius = inputs["key_radius_sq"].tolist() if "key_radius_sq" in inputs else None
    a = inputs["query_mass"].tolist() if "query_mass" in inputs else None
    b = inputs["key_mass"].tolist() if "key_mass" in inputs else None
    groups = len(q[0]) // len(k[0])
    output = []
    for n in range(len(q)):
        for h in range(len(q[0])):
            g = h // groups
            for i, query in enumerate(q[n][h]):
                scores = {}
                for j, key in enumerate(k[n][g]):
                    if not allowed[n][h][i][j]:
                        continue
                    if radius is None:
                        d2 = sum((x - y) ** 2 for x, y in zip(query, key, strict=True))
                    else:
                        dot = sum(x * y for x, y in zip(query, key, strict=True))
                        d2 = max(sum(x * x for x in query) + radius[g] - 2 * dot, 0.0)
                    if law == "force":
                        score = mass[h] ** 2 / (d2 + eps[h])
                        score *= a[n][h][i] if a else 1.0
                        score *= b[n][h][j] if b else 1.0
                    else:
                        score = -(mass[h] ** 2) * math.log(d2 + eps[h])
                        score += math.log(b[n][h][j]) if b else 0.0
                    scores[j] = score + bias[n][h][i][j]
                width = len(v[0][0][0])
                row = [0.0] * width
                if scores:
                    top = max(scores.values())
                    weights = {j: math.exp(s - top) for j, s in scores.items()}
                    total = sum(weights.values())
                    for j, w in weights.items():
                        row = [r + w / total * x for r, x in zip(row, v[n][g][j], strict=True)]
                output.append(row)
    shape = (len(q), len(q[0]), len(q[0][0]), len(v[0][0][0]))
    return torch.tensor(output, dtype=torch.float64).view(shape)


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
    expected = by_hand(inputs, law, allowed.tolist(), bias.tolist())
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
    names = [name for name in LEAVES if name in inputs]

    def function(*leaves):
        arguments = dict(zip(names, leaves, strict=True))
        return run(gravity_attention_reference, arguments, law=law, mask=mask)

    leaves = [inputs[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(function, leaves, atol=2e-5)


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
