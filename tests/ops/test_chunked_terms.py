"""The chunked implementation's further terms and rules: the reference's numbers, and less work."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operator_cases import (
    BATCH_TERMS,
    TERMS,
    cast,
    make_inputs,
    packed_ranges,
    padding_mask,
    padding_ranges,
    run,
    values_and_gradients,
)

from gravity_hf.ops import blocks
from gravity_hf.ops.blocks import Sizes, iterate_blocks
from gravity_hf.ops.chunked import augment, gravity_attention_chunked
from gravity_hf.ops.intervals import Intervals
from gravity_hf.ops.reference import gravity_attention_reference

CASES = {**TERMS, **BATCH_TERMS}
ALL_TERMS = pytest.mark.parametrize("term", CASES)
RULES = {
    "window": {"window": 3},
    "causal_window": {"window": 3, "causal": True},
    "packed": {"key_ranges": packed_ranges(4, 0, 1, 6), "causal": True},
    "packed_window": {"key_ranges": packed_ranges(4, 0, 1, 6), "window": 2},
    "left": {"key_ranges": padding_ranges(2, 11, "left"), "causal": True},
    "right": {"key_ranges": padding_ranges(2, 11, "right")},
    "left_mask": {"mask": padding_mask(2, 11, "left"), "window": 4, "causal": True},
}


@pytest.fixture(params=["one_block", "many_blocks", "unread"])
def block_size(request, monkeypatch):
    """`unread`: as on a GPU, where the values of key ranges are not read to choose blocks."""
    if request.param != "one_block":
        monkeypatch.setitem(blocks.ELEMENTS, "cpu", 24)
        monkeypatch.setitem(blocks.ROWS_MASKED, "cpu", 4)
    if request.param == "unread":
        monkeypatch.setattr(Intervals, "_known", False)


def check(inputs, **options):
    expected = values_and_gradients(gravity_attention_reference, inputs, **options)
    actual = values_and_gradients(gravity_attention_chunked, inputs, **options)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-9, msg=name)


@ALL_TERMS
@pytest.mark.parametrize("token_masses", [False, True], ids=["plain", "token_masses"])
def test_values_and_all_gradients_of_every_term(block_size, term, token_masses):
    given, options = CASES[term]
    law = given.get("law", "force")
    for queries, keys in ((9, 11), (11, 9)):
        inputs = make_inputs(
            queries=queries, keys=keys, value_width=5, token_masses=token_masses, **given
        )
        check(inputs, law=law, causal=queries > keys, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("law", ["force", "power"])
def test_values_and_all_gradients_of_every_rule(block_size, law, rule):
    given = {"batch": 1} if "packed" in rule else {}
    check(make_inputs(queries=11, keys=11, law=law, **given), law=law, **RULES[rule])


DRAWN = st.fixed_dictionaries(
    {
        "term": st.sampled_from(sorted(CASES)),
        "queries": st.integers(1, 7),
        "keys": st.integers(1, 7),
        "lifted": st.booleans(),
        "token_masses": st.booleans(),
        "head_bias": st.booleans(),
        "causal": st.booleans(),
        "window": st.sampled_from([None, None, 1, 2, 9]),
        "ranges": st.sampled_from([None, "one", "each"]),
        "mask": st.sampled_from([None, "bool", "float"]),
        "exclude_self": st.booleans(),
        "seed": st.integers(0, 10_000),
        "elements": st.sampled_from([6, 40, 2**18]),
        "unread": st.booleans(),
    }
)


@settings(max_examples=80)
@given(drawn=DRAWN)
def test_any_combination_equals_the_reference(drawn):
    given, options = CASES[drawn["term"]]
    law, table = given.get("law", "force"), given.get("table", False)
    given = {
        "queries": drawn["queries"],
        "keys": drawn["keys"],
        "lifted": drawn["lifted"] and not table and "curvature" not in options,
        "token_masses": drawn["token_masses"],
        "seed": drawn["seed"],
        **given,
    }
    given["head_bias"] = law == "force" and (drawn["head_bias"] or given.get("head_bias", False))
    shape, g = (drawn["queries"], drawn["keys"]), torch.Generator().manual_seed(drawn["seed"])
    options = {"law": law, "causal": drawn["causal"], "window": drawn["window"], **options}
    options["exclude_self"] = drawn["exclude_self"]
    if drawn["ranges"] is not None:
        ends = (2, 2, 1 if drawn["ranges"] == "one" else drawn["queries"])
        ends = torch.randint(0, drawn["keys"] + 1, ends, generator=g, dtype=torch.int32)
        options["key_ranges"] = torch.stack(list(ends.sort(-1).values), -1)
    if drawn["mask"] is not None:
        mask = torch.randn(2, 1, *shape, generator=g).double()
        hidden = mask > 0.5
        options["mask"] = (
            ~hidden if drawn["mask"] == "bool" else mask.masked_fill(hidden, -torch.inf)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocks.ELEMENTS, "cpu", drawn["elements"])
        patch.setitem(blocks.ROWS_MASKED, "cpu", 4)
        if drawn["unread"]:
            patch.setattr(Intervals, "_known", False)
        check(make_inputs(**given), **options)


@ALL_TERMS
def test_decoding_with_every_term(term):
    """Few queries and no gradient: keys are not augmented."""
    given, options = CASES[term]
    inputs = make_inputs(queries=2, token_masses=True, **given)
    options = {**options, "law": given.get("law", "force"), "window": 4, "causal": True}
    options["key_ranges"] = padding_ranges(2, 11, "left")
    with torch.no_grad():
        expected = run(gravity_attention_reference, inputs, **options)
        actual = run(gravity_attention_chunked, inputs, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@ALL_TERMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget_of_every_term(term, dtype):
    """Against float64 on the rounded inputs; the peer is the reference in the same dtype."""
    given, options = CASES[term]
    options = {**options, "law": given.get("law", "force"), "causal": True}
    truth, peer, actual = {}, {}, {}
    for seed in range(6):
        inputs = cast(make_inputs(queries=40, keys=40, width=16, seed=seed, **given), dtype)
        doubles = {name: x.double() for name, x in inputs.items()}
        for results, implementation, arguments in (
            (truth, gravity_attention_reference, doubles),
            (peer, gravity_attention_reference, inputs),
            (actual, gravity_attention_chunked, inputs),
        ):
            for name, x in values_and_gradients(implementation, arguments, **options).items():
                results.setdefault(name, []).append(x)
    for name, values in truth.items():
        assert_within_budget(
            name,
            torch.stack(actual[name]),
            torch.stack(values),
            torch.stack(peer[name]),
            factor=2.0 if name == "output" else 3.0,
        )


def test_keys_outside_window_or_ranges_are_not_read():
    """What no query of a block sees may hold anything."""
    inputs = make_inputs(queries=6, keys=20)
    rules = [
        {"window": 4, "causal": True},
        {"window": 4},
        {"key_ranges": torch.tensor([[[11, 20]], [[12, 20]]]).int()},
    ]
    for rule in rules:
        clean = values_and_gradients(gravity_attention_chunked, inputs, **rule)
        poisoned = {name: x.clone() for name, x in inputs.items()}
        for name in "kv":
            poisoned[name][:, :, :11] = float("nan")
        actual = values_and_gradients(gravity_attention_chunked, poisoned, **rule)
        for name, value in clean.items():
            if name == "k":  # A key that is not a number has no other gradient.
                value, actual[name] = value[:, :, 11:], actual[name][:, :, 11:]
            assert torch.equal(actual[name], value), name


def scores_computed(length, **rules):
    sizes = Sizes(1, 1, 1, length, length)
    intervals = Intervals(length, length, **rules)
    total = 0
    for block in iterate_blocks(sizes, None, intervals, torch.device("cpu"), torch.float32):
        rows, keys = block.rows, block.window.keys
        total += (rows.stop - rows.start) * (keys.stop - keys.start)
    return total


def test_work_follows_windows_and_documents_not_the_square_of_the_length():
    length, documents = 8192, packed_ranges(*[64] * 128)
    assert scores_computed(length) == length**2
    for rules in (
        {"window": 64, "causal": True},
        {"window": 64},
        {"key_ranges": documents},
        {"key_ranges": documents, "causal": True},
    ):
        assert scores_computed(length, **rules) <= 4 * 64 * length


def test_no_queries_or_no_keys_with_a_table():
    for queries, keys in ((0, 5), (5, 0)):
        inputs = make_inputs(queries=queries, keys=keys, table=True)
        results = values_and_gradients(gravity_attention_chunked, inputs, exclude_self=True)
        assert results["output"].shape == (2, 4, queries, 6)
        assert all((x == 0).all() for x in results.values())


def test_opcheck_of_the_terms():
    inputs = make_inputs(queries=5, keys=6, token_masses=True, head_bias=True, radius=True)
    query, key = augment(inputs["q"], inputs["k"], None, None)
    strength = inputs["mass"].square()[None, :, None]
    tensors = [query, key, inputs["v"], strength, inputs["eps"], inputs["head_bias"][None, :, None]]
    tensors += [inputs["key_mass"], inputs["radius"].square()]
    leaves = [x.detach().requires_grad_() for x in tensors]
    operator = torch.ops.gravity_hf.attention.default
    ranges = padding_ranges(2, 6, "left")
    rules = ("force", True, 3, True, "hard", 2.0, 1.5, 0.0, None, False, 0.3, 1.0, True)
    torch.library.opcheck(operator, (*leaves, None, None, None, ranges, None, *rules))
    bent = ("force", True, None, False, None, 1.0, 1.5, 0.0, None, False, 0.3, 1.0, True)
    arguments = (*leaves[:6], leaves[6], None, None, None, None, None, None)
    torch.library.opcheck(operator, (*arguments, *bent))
    table = make_inputs(queries=5, keys=6, table="batch")["inverse_distance"].requires_grad_()
    rules = ("force", False, None, False, None, 1.0, None, 0.5, None, False, None, 1.0, False)
    arguments = (None, None, *leaves[2:4], None, None, None, None, table, None, None, None)
    torch.library.opcheck(operator, (*arguments, torch.tensor([3]), *rules))


@pytest.mark.parametrize("term", ["soft", "hard-power", "ngt", "lgt"])
def test_fullgraph_compile_equals_eager(term):
    torch._dynamo.reset()
    given, options = CASES[term]
    inputs = make_inputs(batch=1, queries=12, keys=12, token_masses=True, **given)
    if term == "hard-power":
        # As a model of half precision calls it: distances in float32.
        inputs = {name: x.float() for name, x in inputs.items()}
        inputs["v"] = inputs["v"].bfloat16()
    options = {**options, "law": given.get("law", "force"), "window": 5}
    options["key_ranges"] = packed_ranges(5, 7)

    def function(*tensors, **arguments):
        return gravity_attention_chunked(*tensors, **arguments)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(function, inputs, **options)
    actual = values_and_gradients(compiled, inputs, **options)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.gpu
@ALL_TERMS
def test_values_and_all_gradients_of_every_term_on_a_gpu(term):
    """There, the values of key ranges are not read to choose the keys."""
    given, options = CASES[term]
    inputs = make_inputs(queries=11, keys=9, token_masses=True, **given)
    options = {**options, "law": given.get("law", "force"), "causal": True, "window": 6}
    ranges = padding_ranges(2, 9, "left")
    on_gpu = {name: x.cuda() for name, x in inputs.items()}
    expected = values_and_gradients(
        gravity_attention_reference, inputs, key_ranges=ranges, **options
    )
    actual = values_and_gradients(
        gravity_attention_chunked, on_gpu, key_ranges=ranges.cuda(), **options
    )
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].cpu(), value, rtol=1e-9, atol=1e-9, msg=name)
