"""float32 queries and keys with values in half precision: distances keep their digits."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_within_budget
from ops.cluster_cases import clusters, ngt_call
from ops.operator_cases import run, values_and_gradients

from gravity_hf import gravity_attention
from gravity_hf.ops import api
from gravity_hf.ops.chunked import gravity_attention_chunked
from gravity_hf.ops.reference import gravity_attention_reference

# What a Newton Gravity Transformer asks for, as it is by default and as it was published.
CALLS = {
    "power": {"law": "power", "causal": True, "exclude_self": True},
    "force": {"law": "force", "causal": True, "repulsive": True, "cutoff": "hard"},
}
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def mixed_call(law: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = {name: x.float() for name, x in ngt_call(clusters([0, 1, 0]), law=law).items()}
    if "cutoff" not in CALLS[law]:
        inputs.pop("radius")
    return {**inputs, "v": inputs["v"].to(dtype)}


@HALF
@pytest.mark.parametrize("impl", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("call", CALLS)
def test_only_values_are_rounded(call, impl, dtype):
    """The budget is that of a reference which gets all of it in float32 and rounds its output."""
    inputs, options = mixed_call(call, dtype), CALLS[call]
    doubles = {name: x.double() for name, x in inputs.items()}
    singles = {name: x.float() for name, x in inputs.items()}
    exact = values_and_gradients(gravity_attention_reference, doubles, **options)
    peer = values_and_gradients(gravity_attention_reference, singles, **options)
    actual = values_and_gradients(gravity_attention, inputs, impl=impl, **options)
    for name, value in actual.items():
        assert value.dtype == (dtype if name in ("output", "v") else torch.float32), name
        if name in ("output", "v"):
            assert_within_budget(name, value, exact[name], peer[name])
        else:
            # The direction that gradients are taken in is rounded with the output's dtype.
            torch.testing.assert_close(value, peer[name], rtol=3e-2, atol=3e-3, msg=name)


def test_near_pairs_keep_digits_that_half_precision_has_not():
    """Numbers 0.005 apart are equal in bfloat16; here they decide which key is attended to."""
    k = torch.full((1, 1, 2, 16), 3.0)
    k[0, 0, 1] += 0.005
    values = torch.eye(2, dtype=torch.bfloat16)[None, None]
    arguments = (k[:, :, 1:], k, values, torch.tensor([2.0]))
    for impl in ("reference", "chunked"):
        # d^2 is 4e-4 and 0.
        output = gravity_attention(*arguments, eps=1e-4, law="power", impl=impl)
        assert output[0, 0, 0, 1] > 0.9
    rounded = gravity_attention(*(x.bfloat16() for x in arguments[:3]), arguments[3], eps=1e-4)
    assert rounded[0, 0, 0].tolist() == [0.5, 0.5]


@HALF
@pytest.mark.parametrize("call", CALLS)
def test_decoding_equals_the_whole(call, dtype):
    inputs, options = mixed_call(call, dtype), CALLS[call]
    whole = run(gravity_attention_chunked, inputs, **options)
    last = {**inputs, "q": inputs["q"][:, :, -1:]}
    if "query_mass" in inputs:
        last["query_mass"] = inputs["query_mass"][:, :, -1:]
    with torch.no_grad():
        decoded = run(gravity_attention_chunked, last, **options)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(decoded, whole[:, :, -1:], rtol=unit, atol=1e-6)


@pytest.mark.parametrize("call", CALLS)
def test_autocast_changes_no_bit(call):
    """Under autocast a model's values are in half precision and its coordinates are not."""
    inputs, options = mixed_call(call, torch.bfloat16), CALLS[call]
    expected = values_and_gradients(gravity_attention, inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual = values_and_gradients(gravity_attention, inputs, **options)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(
    ("vectors", "values"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.bfloat16),
    ],
    ids=str,
)
def test_every_other_mix_is_refused(vectors, values):
    q, v = torch.ones(1, 1, 2, 4, dtype=vectors), torch.ones(1, 1, 2, 4, dtype=values)
    with pytest.raises(ValueError, match=f"v: expected the dtype of q, {vectors}.*, got {values}"):
        gravity_attention(q, q, v, torch.ones(1), eps=0.1)
    with pytest.raises(ValueError, match=f"k: expected the dtype of q, {vectors}, got {values}"):
        gravity_attention(q, v, v, torch.ones(1), eps=0.1)


def test_flex_serves_no_mix_and_auto_knows(monkeypatch):
    """On a GPU without triton."""
    q, v = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="impl='flex' expects q, k and v of one dtype, got"):
        gravity_attention(q, q, v, torch.ones(1), eps=0.1, impl="flex")
    monkeypatch.setattr(api, "_explain", lambda *_: ("flex", "as on a GPU without triton"))
    options = {"mask": None, "dropout_p": 0.0, "softcap": None}
    assert api.choose_implementation(q, q, v, torch.ones(1), options) == "chunked"
    assert api.choose_implementation(v, v, v, torch.ones(1), options) == "flex"
