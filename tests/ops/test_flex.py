"""FlexAttention as an independent second opinion, and what it refuses."""

import pytest
import torch
from helpers import assert_within_budget
from ops.operator_cases import FAMILIES, cast, make_inputs, padding_mask, run

from gravity_hf.ops.cutoff import Cutoff
from gravity_hf.ops.flex import gravity_attention_flex
from gravity_hf.ops.reference import gravity_attention_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


def check(inputs, dtype, **options):
    given = cast(inputs, dtype)
    exact_inputs = {name: x.double() for name, x in given.items()}
    exact = run(gravity_attention_reference, exact_inputs, **options)
    peer = run(gravity_attention_reference, given, **options)
    actual = run(gravity_attention_flex, given, **options)
    # The kernel keeps weights in the dtype of v; the reference keeps them in float32.
    factor = 2.0 if dtype == torch.float32 else 4.0
    assert_within_budget("output", actual, exact, peer, factor=factor)
    return actual


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("law", ["force", "power"])
def test_forward_within_budget(law, family):
    """F18: captured norms express gravity."""
    for lifted in (False, True):
        inputs = make_inputs(
            family=family, lifted=lifted, law=law, queries=33, keys=40, width=32, token_masses=True
        )
        check(inputs, torch.float32, law=law, causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_within_budget_in_half_precision(dtype):
    check(make_inputs(queries=33, keys=40, width=32), dtype)


def test_masks_and_hidden_rows():
    inputs = make_inputs(queries=12, keys=20, width=16)
    mask = torch.randn(2, 1, 12, 20)
    mask[0, 0, 5] = torch.finfo(torch.float32).min
    assert (check(inputs, torch.float32, mask=mask)[0, :, 5] == 0).all()
    check(inputs, torch.float32, mask=padding_mask(2, 20, "left"), causal=True)
    check(inputs, torch.float32, mask=torch.rand(20) > 0.5)


def test_causal_rows_without_keys_give_zeros():
    output = check(make_inputs(queries=12, keys=9, width=16), torch.float32, causal=True)
    assert (output[:, :, :3] == 0).all()


def test_leaves_that_require_grad_are_served_without_grad():
    inputs = cast(make_inputs(width=16), torch.float32)
    inputs["q"].requires_grad_()
    with torch.no_grad():
        output = run(gravity_attention_flex, inputs)
    assert not output.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mass": torch.ones(4, requires_grad=True)}, "under torch.no_grad"),
        ({"dropout_p": 0.1}, "dropout_p = 0, got 0.1"),
        ({name: make_inputs()[name] for name in "qkv"}, "got torch.float64"),
        ({"q": torch.ones(2, 4, 0, 6)}, "no empty dimension"),
        ({"head_bias": torch.ones(4)}, "no head_bias"),
        ({"repulsive": True}, "no repulsive"),
        ({"cutoff": Cutoff(torch.ones(4), "log")}, "no cutoff"),
        ({"max_force": 2.0}, "no max_force"),
        ({"inverse_distance": torch.ones(9, 11), "q": None, "k": None}, "no inverse_distance"),
        ({"softcap": 5.0}, "no softcap"),
        ({"sinks": torch.ones(4)}, "no sinks"),
        ({"window": 3}, "no window"),
        ({"key_ranges": torch.ones(1, 1, 2).int()}, "no key_ranges"),
        ({"exclude_self": True}, "no exclude_self"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_say_what_to_do(changes, message):
    arguments = {**cast(make_inputs(), torch.float32), **changes}
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "mass")]
    with pytest.raises(ValueError, match=message):
        gravity_attention_flex(*tensors, **arguments)


@pytest.mark.gpu
def test_compiled_forward_on_a_gpu():
    inputs = cast(make_inputs(queries=200, keys=200, width=64), torch.bfloat16)
    expected = run(gravity_attention_reference, {n: x.double() for n, x in inputs.items()})
    actual = run(gravity_attention_flex, {n: x.cuda() for n, x in inputs.items()})
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-2, atol=2e-2)
