"""The Triton kernels with every term and every rule of the law: the reference's numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ops.operator_cases import TERMS, make_inputs, packed_ranges, padding_mask, padding_ranges
from ops.triton_cases import check, require_kernels

require_kernels()

RULES = {
    "window": {"window": 9},
    "causal_window": {"window": 40, "causal": True},
    "packed": {"key_ranges": packed_ranges(20, 0, 1, 49), "causal": True},
    "packed_window": {"key_ranges": packed_ranges(20, 0, 1, 49), "window": 5},
    "left": {"key_ranges": padding_ranges(2, 70, "left"), "causal": True},
    "right": {"key_ranges": padding_ranges(2, 70, "right")},
    "left_mask": {"mask": padding_mask(2, 70, "left"), "window": 40, "causal": True},
    "float_mask": {"mask": torch.randn(70, generator=torch.Generator().manual_seed(1))},
}


# More keys than queries, and fewer: causal, so that some rows see no key.
LENGTHS = ((40, 70), (70, 40))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("token_masses", [False, True], ids=["plain", "token_masses"])
def test_values_and_all_gradients_of_every_term(term, token_masses):
    """In the interpreter a term meets both lengths, one of them with masses: which, alternates."""
    given, options = TERMS[term]
    law = given.get("law", "force")
    turn = (list(TERMS).index(term) + token_masses) % 2
    for queries, keys in LENGTHS if torch.cuda.is_available() else LENGTHS[turn : turn + 1]:
        inputs = make_inputs(
            queries=queries, keys=keys, value_width=5, token_masses=token_masses, **given
        )
        check(inputs, law=law, causal=queries > keys, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("law", ["force", "power"])
def test_values_and_all_gradients_of_every_rule(law, rule):
    given = {"batch": 1} if "packed" in rule else {}
    check(make_inputs(queries=70, keys=70, law=law, **given), law=law, **RULES[rule])


DRAWN = st.fixed_dictionaries(
    {
        "term": st.sampled_from(["", *sorted(TERMS)]),
        "law": st.sampled_from(["force", "power"]),
        "queries": st.integers(1, 90),
        "keys": st.integers(1, 90),
        "lifted": st.booleans(),
        "token_masses": st.booleans(),
        "causal": st.booleans(),
        "window": st.sampled_from([None, None, 1, 30, 70]),
        "ranges": st.sampled_from([None, "one", "each"]),
        "mask": st.sampled_from([None, "bool", "float"]),
        "exclude_self": st.booleans(),
        "seed": st.integers(0, 10_000),
    }
)


# A failing case is small enough, and shrinking it in the interpreter would take minutes.
@settings(max_examples=40 if torch.cuda.is_available() else 6, phases=[Phase.generate])
@given(drawn=DRAWN)
def test_any_combination_equals_the_reference(drawn):
    given, options = TERMS.get(drawn["term"], ({"law": drawn["law"]}, {}))
    law, table = given.get("law", "force"), given.get("table", False)
    given = {
        "queries": drawn["queries"],
        "keys": drawn["keys"],
        "lifted": drawn["lifted"] and not table,
        "token_masses": drawn["token_masses"],
        "seed": drawn["seed"],
        **given,
    }
    shape, g = (drawn["queries"], drawn["keys"]), torch.Generator().manual_seed(drawn["seed"])
    options = {"law": law, "causal": drawn["causal"], "window": drawn["window"], **options}
    options["exclude_self"] = drawn["exclude_self"] or options.get("exclude_self", False)
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
    check(make_inputs(**given), **options)
