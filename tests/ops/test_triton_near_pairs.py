"""The Triton kernels where a softening is tiny: what rounding leaves must not decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_within_budget
from ops.operator_cases import make_inputs, run, values_and_gradients
from ops.triton_cases import DEVICE, kernel_results, moved, require_kernels
from torch import Tensor

from gravity_hf.ops.reference import gravity_attention_reference
from gravity_hf.ops.triton import gravity_attention_triton

require_kernels()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from gravity_hf.ops.triton import op as _op  # noqa: E402
from gravity_hf.ops.triton.score import general_gradients, general_scores  # noqa: E402

SHAPE = {"batch": 1, "heads": 2, "key_heads": 2, "queries": 20, "keys": 20, "width": 16}
REPULSIVE = {"repulsive": True, "cutoff": "hard", "causal": True}


@pytest.mark.parametrize("radius", [0.1, 4.5], ids=["all_alone", "some_alone"])
def test_masses_of_tokens_that_see_only_themselves_get_no_gradient(radius):
    """A softmax of one score has no slope; the score's own is up to 1 / eps. NGT as published:
    eps of 1e-6, so that tokens repel themselves by up to a million nats."""
    inputs = make_inputs(token_masses=True, radius=True, value_width=32, **SHAPE)
    inputs["k"], inputs["query_mass"] = inputs["q"].clone(), inputs["key_mass"].clone()
    inputs["eps"], inputs["radius"] = torch.full((2,), 1e-6), torch.full((2,), radius)
    given = {name: x.bfloat16() if name == "v" else x.float() for name, x in inputs.items()}
    doubles = {name: x.double() for name, x in given.items()}
    exact = values_and_gradients(gravity_attention_reference, doubles, **REPULSIVE)
    peer = values_and_gradients(gravity_attention_reference, given, **REPULSIVE)
    actual = kernel_results(given, **REPULSIVE)
    assert (exact["mass"].abs().max() == 0) == (radius < 1)
    for name in ("mass", "key_mass", "query_mass", "v"):
        assert_within_budget(name, actual[name], exact[name], peer[name], factor=3.0)


def test_queries_that_see_near_keys_alone_have_finite_gradients():
    """Some of these pairs are as near as rounding can just not tell: a kernel that told apart what
    another one did not would make weights of e^1000."""
    g = torch.Generator().manual_seed(0)
    inputs = make_inputs(token_masses=True, value_width=32, **{**SHAPE, "queries": 64, "keys": 64})
    near = torch.randn(1, 2, 1, 16, generator=g) * 1.4
    inputs["q"] = near + torch.randn(1, 2, 64, 16, generator=g) * 1.3e-3
    inputs["k"], inputs["query_mass"] = inputs["q"].clone(), inputs["key_mass"].clone()
    inputs["eps"] = torch.full((2,), 1e-6)
    given = {name: x.bfloat16() if name == "v" else x.float() for name, x in inputs.items()}
    for name, value in kernel_results(given, repulsive=True, causal=True).items():
        assert value.isfinite().all(), name


def test_no_weight_of_a_gradient_is_above_one(monkeypatch):
    """As if the forward pass had told apart fewer pairs: its sums are thousands of nats too low."""

    def lowered(problem, saved):
        found = forward(problem, saved)
        saved[0] -= 4000.0
        return found

    forward = _op.forward
    monkeypatch.setattr(_op, "forward", lowered)
    inputs = make_inputs(token_masses=True, value_width=32, **SHAPE)
    inputs["k"], inputs["query_mass"] = inputs["q"].clone(), inputs["key_mass"].clone()
    given = {name: x.float() for name, x in inputs.items()}
    for name, value in kernel_results(given, repulsive=True, causal=True).items():
        assert value.isfinite().all(), name


@triton.jit
def _repulsion_kernel(softened, a, b, out, BLOCK: tl.constexpr):
    """Scores in nats, and their slopes by a, b, strength and the softened distance."""
    at = tl.arange(0, BLOCK)
    n, query_mass, key_mass = tl.load(softened + at), tl.load(a + at), tl.load(b + at)
    score = general_scores(
        n, 0.0, 1.0, query_mass, key_mass, 0.0, 1.0, 1.0, 0.0, "force", True, 1, False, True,
        "none", "none", False,
    )  # fmt: skip
    one = tl.full([BLOCK], 1.0, tl.float32)
    by_distance, _, by_strength, by_a, by_b, _, _ = general_gradients(
        one, n, 0.0, 1.0, query_mass, key_mass, 0.0, 1.0, 1.0, 0.0, "force", True, 1, False, True,
        "none", "none", False,
    )  # fmt: skip
    tl.store(out + at, score * 0.6931471805599453)
    tl.store(out + BLOCK + at, by_a)
    tl.store(out + 2 * BLOCK + at, by_b)
    tl.store(out + 3 * BLOCK + at, by_strength)
    tl.store(out + 4 * BLOCK + at, by_distance)


def test_a_repulsion_of_thousands_of_nats_has_a_floor_and_there_no_slope():
    """A weight of exp(-8192) is 0 whatever its score; its slope is what multiplies rounding."""
    n = torch.logspace(-6, 1, 64)
    a, b = torch.rand(2, 64) + 0.2
    out = torch.empty(5, 64, device=DEVICE)
    _repulsion_kernel[(1,)](*(x.to(DEVICE) for x in (n, a, b)), out, BLOCK=64)
    n, a, b = n.double(), a.double(), b.double()
    score, above = -a * b / n, -a * b / n > -8192
    assert 0 < above.sum() < 64
    slopes = torch.stack([-b / n, -a / n, score, -score / n]) * above
    expected = torch.cat([score.clamp(min=-8192)[None], slopes])
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-6)


def _faint(**terms: Any) -> dict[str, Tensor]:
    """Tokens far from the origin, whose distance to themselves rounding makes larger than eps; a
    strength that makes their scores of themselves 1 to 9."""
    inputs = make_inputs(**SHAPE, **terms)
    inputs["q"] = inputs["q"] + 30.0
    inputs["k"] = inputs["q"].clone()
    inputs["eps"], inputs["mass"] = torch.full((2,), 1e-6), torch.tensor([0.003, 0.002])
    if "query_mass" in inputs:
        inputs["query_mass"] = inputs["query_mass"].abs()
    return {name: x.float() for name, x in inputs.items()}


@pytest.mark.parametrize("call", ["masses", "max_force"])
def test_a_decoded_token_sees_itself_as_in_the_whole(call):
    """Decoding once took rounding's noise for a distance: outputs were off by their own size."""
    given = moved(_faint(token_masses=call == "masses"))
    options = {"causal": True, "max_force": 2.0 if call == "max_force" else None}
    rows = {"q": 2, "query_mass": 2}
    last = {n: x.narrow(rows[n], 17, 3) if n in rows else x for n, x in given.items()}
    with torch.no_grad():
        whole = run(gravity_attention_triton, given, **options)
        decoded = run(gravity_attention_triton, last, **options)
    torch.testing.assert_close(decoded, whole[:, :, -3:], rtol=1e-4, atol=1e-4)
