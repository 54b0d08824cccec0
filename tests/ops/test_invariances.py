"""Symmetries that the law has, for inputs that hypothesis chooses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operator_cases import make_inputs, run

from gravity_hf.ops import gravity_attention

IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["reference", "chunked"])
sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "queries": st.integers(1, 6),
        "keys": st.integers(1, 7),
        "width": st.integers(1, 5),
        "law": st.sampled_from(["force", "power"]),
        "seed": st.integers(0, 10_000),
        "token_masses": st.booleans(),
    }
)
few = settings(max_examples=25)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


@IMPLEMENTATIONS
@few
@given(size=sizes, shift=st.floats(-20, 20))
def test_moving_queries_and_keys_together_changes_nothing(impl, size, shift):
    inputs = make_inputs(**size)
    expected = run(gravity_attention, inputs, law=size["law"], impl=impl)
    moved = {**inputs, "q": inputs["q"] + shift, "k": inputs["k"] + shift}
    close(run(gravity_attention, moved, law=size["law"], impl=impl), expected)


@IMPLEMENTATIONS
@few
@given(size=sizes, lifted=st.booleans())
def test_the_order_of_keys_does_not_matter(impl, size, lifted):
    inputs = make_inputs(lifted=lifted, **size)
    mask = torch.randn(size["queries"], size["keys"]).double()
    order = torch.randperm(size["keys"])
    shuffled = {**inputs, "k": inputs["k"][:, :, order], "v": inputs["v"][:, :, order]}
    if "key_mass" in inputs:
        shuffled["key_mass"] = inputs["key_mass"][..., order]
    options = {"law": size["law"], "impl": impl}
    expected = run(gravity_attention, inputs, mask=mask, **options)
    close(run(gravity_attention, shuffled, mask=mask[:, order], **options), expected)


@IMPLEMENTATIONS
@few
@given(size=sizes, lifted=st.booleans(), causal=st.booleans())
def test_grouped_heads_equal_repeated_keys_and_values(impl, size, lifted, causal):
    inputs = make_inputs(lifted=lifted, **size)
    repeated = {**inputs, "k": inputs["k"].repeat_interleave(2, 1)}
    repeated["v"] = inputs["v"].repeat_interleave(2, 1)
    if lifted:
        repeated["key_radius_sq"] = inputs["key_radius_sq"].repeat_interleave(2)
    options = {"law": size["law"], "impl": impl, "causal": causal}
    expected = run(gravity_attention, inputs, **options)
    close(run(gravity_attention, repeated, **options), expected)


@IMPLEMENTATIONS
@few
@given(size=sizes, scale=st.floats(0.2, 5))
def test_units_of_length(impl, size, scale):
    """Lengths times c, eps times c^2: the force law keeps its scores if masses grow by c, the power
    law keeps its weights as they are."""
    inputs = make_inputs(**size)
    larger = {**inputs, "q": inputs["q"] * scale, "k": inputs["k"] * scale}
    larger["eps"] = inputs["eps"] * scale**2
    if size["law"] == "force":
        larger["mass"] = inputs["mass"] * scale
    options = {"law": size["law"], "impl": impl}
    close(run(gravity_attention, larger, **options), run(gravity_attention, inputs, **options))


@IMPLEMENTATIONS
@few
@given(size=sizes, factor=st.floats(0.1, 10))
def test_scaling_all_token_masses(impl, size, factor):
    """Power law: a common factor of the keys' masses cancels. Force law: it is a factor of M^2."""
    inputs = make_inputs(**{**size, "token_masses": True})
    heavier = {**inputs, "key_mass": inputs["key_mass"] * factor}
    options = {"law": size["law"], "impl": impl}
    same = dict(inputs)
    if size["law"] == "force":
        same["mass"] = inputs["mass"] * factor**0.5
    close(run(gravity_attention, heavier, **options), run(gravity_attention, same, **options))


@IMPLEMENTATIONS
@few
@given(size=sizes)
def test_massless_heads_average_the_values(impl, size):
    inputs = make_inputs(**{**size, "token_masses": False})
    inputs["mass"] = torch.zeros(4).double()
    output = run(gravity_attention, inputs, law=size["law"], impl=impl)
    mean = inputs["v"].mean(2, keepdim=True).repeat_interleave(2, 1)
    close(output, mean.expand_as(output))


@IMPLEMENTATIONS
@few
@given(size=sizes)
def test_inverse_square_weights_of_the_power_law_at_mass_one(impl, size):
    inputs = make_inputs(**{**size, "law": "power", "token_masses": False})
    inputs["mass"] = torch.ones(4).double()
    k, v = (inputs[name].repeat_interleave(2, 1) for name in "kv")
    distance = (inputs["q"][:, :, :, None] - k[:, :, None]).square().sum(-1)
    weights = 1 / (distance + inputs["eps"][:, None, None])
    expected = weights / weights.sum(-1, keepdim=True) @ v
    close(run(gravity_attention, inputs, law="power", impl=impl), expected)


@IMPLEMENTATIONS
@few
@given(size=sizes, causal=st.booleans())
def test_rules_and_limits_that_bind_nothing_change_nothing(impl, size, causal):
    inputs = make_inputs(**size)
    options = {"law": size["law"], "impl": impl, "causal": causal}
    expected = run(gravity_attention, inputs, **options)
    keys = size["keys"]
    loose = {"window": keys + size["queries"], "key_ranges": torch.tensor([[[0, keys]]]).int()}
    if size["law"] == "force":
        loose["max_force"] = 1e6
        inputs["head_bias"] = torch.zeros(4).double()
    inputs["radius"] = torch.full((4,), 1e3).double()
    close(run(gravity_attention, inputs, cutoff="hard", **loose, **options), expected)


@IMPLEMENTATIONS
@few
@given(size=sizes)
def test_excluding_itself_a_query_forgets_its_own_value(impl, size):
    """Only where it sees no other key does it keep itself."""
    inputs = make_inputs(**{**size, "queries": size["keys"]})
    options = {"law": size["law"], "impl": impl, "causal": True, "exclude_self": True}
    expected = run(gravity_attention, inputs, **options)
    close(expected[:, :, 0], inputs["v"][:, :, 0].repeat_interleave(2, 1))
    last = size["keys"] - 1
    inputs["v"][:, :, last] += 100
    actual = run(gravity_attention, inputs, **options)
    close(actual[:, :, 1:], expected[:, :, 1:])


@IMPLEMENTATIONS
@few
@given(size=sizes)
def test_repulsion_is_attraction_of_the_opposite_sign(impl, size):
    inputs = make_inputs(**{**size, "law": "force"}, table=True)
    opposite = {**inputs, "inverse_distance": -inputs["inverse_distance"]}
    expected = run(gravity_attention, opposite, impl=impl)
    close(run(gravity_attention, inputs, impl=impl, repulsive=True), expected)


@IMPLEMENTATIONS
@few
@given(size=sizes, epsilon=st.floats(0.05, 2))
def test_a_table_of_the_distances_equals_the_distances(impl, size, epsilon):
    inputs = make_inputs(**{**size, "law": "force", "batch": 1}, heads=2, key_heads=1)
    inputs["q"][:, 1] = inputs["q"][:, 0]
    inputs["eps"] = torch.full((2,), epsilon, dtype=torch.float64)
    expected = run(gravity_attention, inputs, impl=impl, causal=True)
    distance_sq = (inputs["q"][0, 0, :, None] - inputs["k"][0, 0]).square().sum(-1)
    table = {name: x for name, x in inputs.items() if name not in ("q", "k", "eps")}
    table["inverse_distance"] = 1 / (distance_sq + epsilon)
    close(run(gravity_attention, table, impl=impl, causal=True), expected)
