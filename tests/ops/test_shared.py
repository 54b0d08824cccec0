"""Heads that share one distance, of a table or of positions: the reference's numbers, less work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.operator_cases import make_inputs, padding_mask, padding_ranges, run

from gravity_hf.ops import blocks, gravity_attention
from gravity_hf.ops import chunked as chunked_module
from gravity_hf.ops.curvature import Curvature

ROOT = Path(__file__).resolve().parents[2]
CURVED = Curvature(1.4, 0.3)
SPACES = {
    "flat": {"eps": 0.3},
    "flat-power": {"eps": 0.3, "law": "power"},
    "curved": {"eps": 0.0, "curvature": CURVED, "max_force": 1.5},
    "curved-tanh": {"eps": 0.2, "curvature": CURVED, "max_force": 1.5, "force_cap": "tanh"},
    "curved-power": {"eps": 0.0, "curvature": CURVED, "law": "power"},
}
RULES = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": 3, "exclude_self": True},
    "left": {"key_ranges": padding_ranges(2, 9, "left"), "causal": True},
    "mask": {"mask": padding_mask(2, 9, "right")},
    "float_mask": {"mask": torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(3))},
}


@pytest.fixture(params=["one_block", "many_blocks"])
def block_size(request, monkeypatch):
    if request.param == "many_blocks":
        monkeypatch.setitem(blocks.ELEMENTS, "cpu", 24)
        monkeypatch.setitem(blocks.ROWS_MASKED, "cpu", 4)


@pytest.fixture
def shared_calls(monkeypatch):
    """How many calls took the path of shared distances."""
    calls = []
    whole = chunked_module._shared

    def count(*arguments):
        calls.append(1)
        return whole(*arguments)

    monkeypatch.setattr(chunked_module, "_shared", count)
    return calls


def positions(*, queries=9, keys=9, batched=False, law="force"):
    """Leaves: positions `[b, 1, T, P]`, as a model has them, and what else has a gradient."""
    given = make_inputs(queries=queries, keys=keys, token_masses=True, law=law, key_heads=2)
    g = torch.Generator().manual_seed(8)
    lead = 2 if batched else 1
    k = torch.randn(lead, 1, keys, 5, generator=g).double()
    names = ("v", "mass", "query_mass", "key_mass")
    leaves = {"k": k, **{name: given[name] for name in names if name in given}}
    return {name: x.clone().requires_grad_() for name, x in leaves.items()}


def attend(leaves, queries, impl, **options):
    """Query i and the key at its position are one token: the same memory."""
    rest = {name: x for name, x in leaves.items() if name != "k"}
    k = leaves["k"].expand(2, 2, -1, -1)
    q = leaves["k"][:, :, -queries:].expand(2, 4, -1, -1)
    return run(gravity_attention, {"q": q, "k": k, **rest, **options}, impl=impl)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("space", SPACES)
def test_positions_and_all_their_gradients_equal_the_reference(
    block_size, shared_calls, space, rule
):
    options = {**SPACES[space], **RULES[rule]}
    for batched in (False, True):
        results = []
        for impl in ("reference", "chunked"):
            leaves = positions(batched=batched, law=options.get("law", "force"))
            output = attend(leaves, 9, impl, **options)
            direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
            gradients = torch.autograd.grad(output, list(leaves.values()), direction.to(output))
            results.append({"output": output, **dict(zip(leaves, gradients, strict=True))})
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-8, atol=1e-9, msg=name)
    assert len(shared_calls) == 2


@pytest.mark.parametrize("space", SPACES)
def test_new_tokens_beside_a_cache_of_positions(shared_calls, space):
    options = {**SPACES[space], "causal": True}
    for queries in (1, 3):
        leaves = positions(queries=queries, law=options.get("law", "force"))
        with torch.no_grad():
            expected = attend(leaves, queries, "reference", **options)
            actual = attend(leaves, queries, "chunked", **options)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert len(shared_calls) == 2


def test_every_entry_of_a_leaf_has_its_own_gradient():
    """Of an expanded leaf, too: what shares memory is not one number then."""
    leaves = positions()
    q = leaves["k"].detach().expand(2, 4, 9, 5).requires_grad_()
    k = leaves["k"].detach().expand(2, 2, 9, 5)
    rest = {name: x.detach() for name, x in leaves.items() if name != "k"}
    gradients = []
    for impl in ("reference", "chunked"):
        output = run(gravity_attention, {"q": q, "k": k, **rest, "eps": 0.3}, impl=impl)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).double()
        gradients += torch.autograd.grad(output, q, direction)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    assert not torch.equal(gradients[1][0, 0], gradients[1][1, 1])


def problem(kind):
    """Arguments of the operator, in the order of its schema."""
    given = make_inputs(queries=5, keys=6, token_masses=True, table="batch")
    strength = given["mass"].square()[None, :, None] * given["query_mass"]
    tensors = [given["v"], strength, given["key_mass"]]
    if kind == "table":
        tensors = [None, None, *tensors, given["inverse_distance"]]
    else:
        g = torch.Generator().manual_seed(1)
        q, k = (torch.randn(1, n, 4, generator=g).double() for n in (5, 6))
        tensors = [*chunked_module.augment(q, k, None, None), *tensors, None]
    tensors = [None if x is None else x.detach().requires_grad_() for x in tensors]
    rules = ("force", True, None, True, 1.5, kind != "table")
    bent = (0.0, None, 1.0) if kind == "table" else (0.1, 0.8, 0.2)
    return (*tensors, None, padding_ranges(2, 6, "left"), *rules, *bent)


@pytest.mark.parametrize("kind", ["table", "positions"])
def test_opcheck(kind):
    torch.library.opcheck(torch.ops.gravity_hf.shared_attention.default, problem(kind))


@pytest.mark.parametrize("space", ["flat-power", "curved"])
def test_fullgraph_compile_equals_eager(space):
    torch._dynamo.reset()
    options = {**SPACES[space], "causal": True}

    def function(leaves):
        return attend(leaves, 9, "chunked", **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = positions(law=options.get("law", "force"))
        output = call(leaves)
        results.append([output, *torch.autograd.grad(output.sum(), list(leaves.values()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_of_a_table_are_refused():
    inputs = make_inputs(table=True)
    inputs["inverse_distance"].requires_grad_()
    output = run(gravity_attention, inputs, impl="chunked")
    gradient = torch.autograd.grad(output.sum(), inputs["inverse_distance"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives only. Use impl='reference'"):
        gradient.sum().backward()


def test_causal_answers_do_not_depend_on_later_tokens():
    inputs = make_inputs(table=True, queries=300, keys=300, token_masses=True)
    before = run(gravity_attention, inputs, causal=True, max_force=50.0)
    for name in ("v", "key_mass", "query_mass"):
        inputs[name][:, :, 200:] = 7.0
    inputs["inverse_distance"][:, 200:] = 3.0
    after = run(gravity_attention, inputs, causal=True, max_force=50.0)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


MEMORY = """
import torch
from pathlib import Path
from gravity_hf.ops import gravity_attention
from gravity_hf.ops.curvature import Curvature
torch.set_num_threads(1)
def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
def extra(length):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kib("VmRSS")
    p = (0.02 * torch.randn(length, 32)).requires_grad_()
    v = torch.randn(1, 2, length, 32, requires_grad=True)
    m = torch.rand(1, 2, length, requires_grad=True)
    x = p.expand(1, 2, -1, -1)
    out = gravity_attention(x, x, v, torch.ones(2), eps=0.2, curvature=Curvature(0.15),
                            query_mass=m, key_mass=m, max_force=50.0, causal=True)
    out.sum().backward()
    return kib("VmHWM") - before
extra(64)
print(extra(4096))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of resident memory")
def test_memory_of_positions_is_linear_in_length():
    """One table of 4096 tokens is 64 MiB, and its gradient as much again."""
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert 0 < int(done.stdout) < 64 * 1024
