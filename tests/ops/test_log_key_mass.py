"""Masses of keys by their logarithms: for masses that no number of the dtype holds."""

from __future__ import annotations

import pytest
import torch
from ops.operator_cases import make_inputs, values_and_gradients

from gravity_hf import gravity_attention
from gravity_hf.ops.chunked import gravity_attention_chunked
from gravity_hf.ops.reference import gravity_attention_reference

IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [gravity_attention_reference, gravity_attention_chunked]
)


@IMPLEMENTATIONS
@pytest.mark.parametrize("table", [False, True], ids=["vectors", "table"])
def test_a_mass_and_its_logarithm_are_the_same(implementation, table):
    inputs = make_inputs(law="power", token_masses=True, table=table)
    options = {"law": "power", "causal": True}
    expected = values_and_gradients(implementation, inputs, **options)
    mass = inputs.pop("key_mass")
    actual = values_and_gradients(implementation, {**inputs, "log_key_mass": mass.log()}, **options)
    # d/d ln b = b d/db
    expected["log_key_mass"] = expected.pop("key_mass") * mass
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=name)


@IMPLEMENTATIONS
def test_ratios_beyond_the_range_of_numbers_have_values_and_gradients(implementation):
    """In float32 masses of these logarithms would be 0, and their logarithms -inf."""
    inputs = make_inputs(law="power", token_masses=True)
    logs = inputs.pop("key_mass").log()
    options = {"law": "power", "causal": True}
    moderate = {**inputs, "log_key_mass": logs}
    expected = values_and_gradients(implementation, moderate, **options)
    inputs = {name: x.float() for name, x in inputs.items()}
    faint = {**inputs, "log_key_mass": logs.float() - 1000.0}
    actual = values_and_gradients(implementation, faint, **options)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("law", "mass", "length", "message"),
    [
        ("force", None, 2, "log_key_mass: expected law='power', got force"),
        ("power", torch.ones(1, 1, 2), 2, "log_key_mass: expected no key_mass beside it, got both"),
        ("power", None, 3, r"log_key_mass: expected \[B, H, Tk\], got \(1, 1, 3\)"),
    ],
)
def test_refusals(law, mass, length, message):
    q, logs = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, length)
    options = {"eps": 0.1, "law": law, "key_mass": mass, "log_key_mass": logs}
    with pytest.raises(ValueError, match=message):
        gravity_attention(q, q, q, torch.ones(1), **options)
