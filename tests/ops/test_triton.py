"""The Triton kernels: within their error budgets, and citizens of torch.

On a machine without a GPU they run in Triton's interpreter, at small sizes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.operator_cases import FAMILIES, cast, make_inputs, run, values_and_gradients
from ops.triton_cases import DEVICE, check, check_budgets, kernel_results, moved, require_kernels
from torch.utils.checkpoint import checkpoint

from gravity_hf.ops import gravity_attention
from gravity_hf.ops.reference import gravity_attention_reference
from gravity_hf.ops.triton import gravity_attention_triton, triton_refusal

require_kernels()

from gravity_hf.ops.triton import op as _op  # noqa: E402
from gravity_hf.ops.triton.problem import aligned  # noqa: E402

LAW_AND_DISTANCE = [(law, lifted) for law in ("force", "power") for lifted in (False, True)]
ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_error_budget_of_every_input_family(family, dtype):
    """F16: near and exact collisions are where a distance loses digits. `dominating_mass` has heads
    whose scores are bounded beside one whose are not: both codes of the softmax run."""
    cases = LAW_AND_DISTANCE if ON_GPU else [LAW_AND_DISTANCE[FAMILIES.index(family) % 4]]
    for law, lifted in cases:
        shape = {"queries": 63, "keys": 70, "width": 64, "token_masses": False, "law": law}
        seeds = range(8 if ON_GPU else 2)
        inputs = [make_inputs(family=family, lifted=lifted, seed=s, **shape) for s in seeds]
        check_budgets(dtype, inputs, law=law, causal=True)


SHAPES = [
    # queries, keys, width, value width, query heads, key heads
    (1, 7, 16, 16, 4, 1),
    (7, 1, 64, 64, 4, 4),
    (63, 128, 80, 80, 8, 8),
    (128, 63, 96, 32, 8, 1),
    (100, 65, 32, 64, 4, 2),
    (33, 40, 256, 256, 2, 1),
    (20, 130, 20, 12, 6, 2),
    (1000, 1000, 64, 64, 4, 1),
    (129, 1000, 128, 128, 8, 2),
    (1000, 257, 128, 64, 2, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_every_shape(shape):
    if not ON_GPU and shape[0] * shape[1] > 20_000:
        pytest.skip("too long for the interpreter")
    names = ("queries", "keys", "width", "value_width", "heads", "key_heads")
    sizes = dict(zip(names, shape, strict=True))
    for law, causal in (("force", True), ("power", False)):
        check(make_inputs(batch=1, law=law, **sizes), law=law, causal=causal)
    if ON_GPU:
        for dtype, (law, causal) in itertools.product(
            DTYPES[1:], (("force", True), ("power", False))
        ):
            inputs = [make_inputs(law=law, seed=seed, **sizes) for seed in range(4)]
            check_budgets(dtype, inputs, law=law, causal=causal)


def test_views_are_read_in_place_and_odd_widths_are_padded():
    inputs = cast(make_inputs(queries=33, keys=40, width=16), torch.float32)
    strided = {name: x.clone() for name, x in inputs.items()}
    for name in "qkv":
        strided[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert not strided[name].is_contiguous()
    expected = kernel_results(inputs, causal=True)
    assert all(aligned(strided[name]) is strided[name] for name in "qkv")
    for name, value in kernel_results(strided, causal=True).items():
        assert torch.equal(value, expected[name]), name
    for width in (5, 6):
        check(make_inputs(queries=33, keys=40, width=width), causal=True)


def test_every_run_gives_the_same_bits():
    heads = 8 if ON_GPU else 4
    inputs = cast(make_inputs(queries=70, keys=70, width=32, heads=heads), torch.bfloat16)
    first = kernel_results(inputs, causal=True)
    for name, value in kernel_results(inputs, causal=True).items():
        assert torch.equal(value, first[name]), name


def test_outputs_are_written_whole():
    """`torch.empty` returns NaN here (conftest): what was not written would show."""
    inputs = make_inputs(queries=70, keys=45, width=20, lifted=True)
    results = kernel_results(cast(inputs, torch.float32), causal=True)
    assert all(x.isfinite().all() for x in results.values())
    assert (results["output"][:, :, :25] == 0).all()  # rows before the first key


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=["no_queries", "no_keys"])
def test_no_queries_or_no_keys(shape):
    inputs = cast(make_inputs(queries=shape[0], keys=shape[1]), torch.float32)
    results = kernel_results(inputs)
    assert results["output"].shape == (2, 4, shape[0], 6)
    assert all((x == 0).all() for x in results.values())


@pytest.mark.parametrize("law", ["force", "power"])
def test_masses_get_an_exact_gradient_where_scores_hardly_differ(law):
    """A soft head in half precision: sums of nearly equal scores would drown in the rounding of the
    output, which enters every row's gradient of scores alike."""
    inputs = make_inputs(queries=64, keys=64, width=32, law=law)
    inputs["eps"] = inputs["eps"] + 2000.0
    inputs["mass"] = inputs["mass"] + 40.0
    given = cast(inputs, torch.bfloat16)
    doubles = {name: x.double() for name, x in given.items()}
    expected = values_and_gradients(gravity_attention_reference, doubles, law=law)
    actual = kernel_results(given, law=law)
    for name in ("mass", "eps"):
        error = (actual[name].double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 0.02, f"{name}: {error:.1e}"


def test_dropout_drops_the_right_share_and_keeps_the_mean():
    inputs = cast(make_inputs(batch=1, heads=1, key_heads=1, queries=64, keys=128), torch.float32)
    inputs["v"] = torch.eye(128)[None, None]
    weights = kernel_results(inputs)["output"]
    dropped = kernel_results(inputs, dropout_p=0.25)["output"]
    zero = dropped == 0
    assert abs(zero.double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 8192) ** 0.5
    torch.testing.assert_close(dropped[~zero], weights[~zero] / 0.75, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("term", ["plain", "table"])
def test_dropout_backward_uses_the_mask_of_the_forward(term):
    """With v = identity the output is the dropped weights: they say which were kept, and the
    reference with those weights kept has the same gradients."""
    table = term == "table"
    inputs = make_inputs(batch=1, heads=2, key_heads=1, queries=40, keys=48, width=8, table=table)
    inputs = cast({**inputs, "v": torch.eye(48).double()[None, None]}, torch.float32)
    torch.manual_seed(3)
    actual = kernel_results(inputs, dropout_p=0.5)
    kept = (actual["output"] != 0).double() * 2.0

    leaves = {n: x.double().requires_grad_() for n, x in inputs.items()}
    output = run(gravity_attention_reference, leaves) * kept
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).double()
    for name in leaves:
        if name == "v":
            continue  # kept weights times an identity are the output only where v is not moved
        expected = torch.autograd.grad(output, leaves[name], direction, retain_graph=True)[0]
        error = (actual[name].double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"
    expected = (actual["output"].double().mT @ direction).sum(1, keepdim=True)
    torch.testing.assert_close(actual["v"].double(), expected, rtol=1e-4, atol=1e-5)


def test_dropout_follows_manual_seed_and_checkpointing():
    inputs = moved(cast(make_inputs(queries=20, keys=20), torch.float32))

    def checkpointed(*tensors, **options):
        return checkpoint(gravity_attention_triton, *tensors, use_reentrant=False, **options)

    def seeded(function):
        torch.manual_seed(11)
        return values_and_gradients(function, inputs, dropout_p=0.4)

    first = seeded(gravity_attention_triton)
    for again in (seeded(gravity_attention_triton), seeded(checkpointed)):
        for name, value in first.items():
            assert torch.equal(again[name], value), name
    other = values_and_gradients(gravity_attention_triton, inputs, dropout_p=0.4)
    assert not torch.equal(other["output"], first["output"])


def operator_arguments(inputs, *, save, law="force", **options):
    """Arguments of the torch operator; see `ops/triton/problem.py`."""
    tensors = {**inputs, "strength": inputs["mass"].square()}
    names = (
        "q", "k", "v", "strength", "eps", "key_radius_sq", "query_mass", "key_mass", "head_bias",
        "radius", "inverse_distance", "sink",
    )  # fmt: skip
    if "inverse_distance" in inputs:
        tensors["inverse_distance"] = inputs["inverse_distance"][None]
    leaves = [tensors.get(name) for name in names]
    if save:
        leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    given = {"mask": None, "key_ranges": None, "seed": None, **options}
    return (
        *leaves, given["mask"], given["key_ranges"], given["seed"], law, True, 0, False, False,
        "none", 1.0, float("inf"), 0.0, "clamp", None, 1.0, save,
    )  # fmt: skip


@pytest.mark.parametrize("law", ["force", "power"])
def test_opcheck(law):
    operator = torch.ops.gravity_hf.triton_attention.default
    shape = {"queries": 20, "keys": 24, "width": 16, "law": law}
    inputs = moved(cast(make_inputs(token_masses=True, **shape), torch.float32))
    torch.library.opcheck(operator, operator_arguments(inputs, save=3, law=law))
    inputs = moved(cast(make_inputs(lifted=True, **shape), torch.float32))
    ranges = torch.tensor([[[0, 20]], [[4, 24]]], dtype=torch.int32, device=DEVICE)
    arguments = operator_arguments(inputs, save=0, law=law, key_ranges=ranges)
    torch.library.opcheck(operator, arguments)
    table = moved(cast(make_inputs(table=True, **shape), torch.float32))
    torch.library.opcheck(operator, operator_arguments(table, save=2))


@pytest.mark.parametrize("queries", [1, 40])
def test_fullgraph_compile_and_export_equal_eager(queries):
    inputs = moved(cast(make_inputs(queries=queries, keys=48, width=16), torch.float32))

    def function(*tensors, **options):
        return gravity_attention(*tensors, impl="triton", **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(function, inputs, causal=True)
    actual = values_and_gradients(compiled, inputs, causal=True)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, inputs), run(function, inputs))

    class Module(torch.nn.Module):
        def forward(self, q, k, v, mass, eps):
            return gravity_attention(q, k, v, mass, eps=eps, causal=True, impl="triton")

    arguments = tuple(inputs[name] for name in ("q", "k", "v", "mass", "eps"))
    exported = torch.export.export(Module(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), expected["output"])


def test_checkpointing_gives_the_same_gradients():
    inputs = moved(cast(make_inputs(queries=20, keys=20), torch.float32))

    def checkpointed(*tensors, **options):
        return checkpoint(gravity_attention_triton, *tensors, use_reentrant=False, **options)

    expected = values_and_gradients(gravity_attention_triton, inputs, causal=True)
    for name, value in values_and_gradients(checkpointed, inputs, causal=True).items():
        assert torch.equal(value, expected[name]), name


def test_only_wanted_gradients_are_computed(monkeypatch):
    """Frozen masses, as in LoRA: no per-row sums, and the same gradients of q, k and v."""
    inputs = moved(cast(make_inputs(queries=20, keys=20), torch.float32))
    expected = values_and_gradients(gravity_attention_triton, inputs, causal=True)
    levels, backward = [], _op.backward

    def watched(*arguments, sums, **kept):
        levels.append(sums)
        return backward(*arguments, sums=sums, **kept)

    monkeypatch.setattr(_op, "backward", watched)
    leaves = {n: x.clone().requires_grad_(n in "qkv") for n, x in inputs.items()}
    output = run(gravity_attention_triton, leaves, causal=True)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    gradients = torch.autograd.grad(output, [leaves[n] for n in "qkv"], direction)
    assert levels == [0]
    for name, value in zip("qkv", gradients, strict=True):
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("splits", [2, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 4))])
def test_query_heads_of_a_key_head_may_be_divided_among_programs(splits, monkeypatch):
    """Few keys on a large device: each program adds up its own heads' part. Views, as models pass
    them, keep their layout, which is what a compiler is told."""
    monkeypatch.setattr("gravity_hf.ops.triton.key_gradients.head_splits", lambda *_: splits)
    inputs = make_inputs(queries=40, keys=40, width=16, heads=8, token_masses=True)
    check(inputs, causal=True)
    inputs = moved(cast(inputs, torch.float32))
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    if splits == 2 or ON_GPU:
        # Shapes are the operator's, whoever adds up what: in the interpreter once is enough.
        operator = torch.ops.gravity_hf.triton_attention.default
        arguments = operator_arguments(inputs, save=3)
        torch.library.opcheck(operator, arguments, test_utils="test_aot_dispatch_dynamic")
    leaves = {n: x.clone(memory_format=torch.preserve_format) for n, x in inputs.items()}
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    output = run(gravity_attention_triton, leaves)
    gradients = torch.autograd.grad(output.sum(), [leaves[name] for name in "qkv"])
    for name, gradient in zip("qkv", gradients, strict=True):
        assert gradient.stride() == leaves[name].stride(), name


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("law", ["force", "power"])
def test_nan_inputs_are_not_hidden(law, name):
    """A NaN is no distance, least of all 0."""
    inputs = cast(make_inputs(queries=20, keys=20), torch.float32)
    inputs[name][0, 0, 3] = float("nan")
    with torch.no_grad():
        output = run(gravity_attention_triton, moved(inputs), law=law).cpu()
    assert output[0, 0, 3].isnan().all()
    assert output[1].isfinite().all()


def test_second_derivatives_are_refused():
    inputs = moved(cast(make_inputs(), torch.float32))
    inputs["q"].requires_grad_()
    output = run(gravity_attention_triton, inputs)
    gradient = torch.autograd.grad(output.sum(), inputs["q"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives only. Use impl='reference'"):
        gradient.sum().backward()


def test_forward_mode_derivatives_are_refused():
    inputs = moved(cast(make_inputs(), torch.float32))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs["q"], torch.ones_like(inputs["q"]))
        with pytest.raises(RuntimeError, match="backward ones only. Use impl='reference'"):
            run(gravity_attention_triton, {**inputs, "q": dual})


def test_shapes_without_data():
    """Meta tensors: shapes, forward and backward, without memory."""
    q = torch.empty(1, 2, 70_000, 64, device="meta", requires_grad=True)
    terms = {"mass": torch.empty(2, device="meta"), "eps": torch.empty(2, device="meta")}
    output = run(gravity_attention_triton, {"q": q, "k": q, "v": q, **terms})
    assert output.shape == q.shape and output.is_meta
    output.sum().backward()
    assert q.grad.shape == q.shape


def test_refusals_name_the_reason():
    inputs = moved(make_inputs())
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: .*float64"):
        run(gravity_attention, inputs, impl="triton")
    mask = torch.zeros(9, 11, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="the float mask requires a gradient"):
        run(gravity_attention, cast(inputs, torch.float32), mask=mask, impl="triton")
    with pytest.raises(ValueError, match="cannot serve this call: softcap needs the neutral score"):
        run(gravity_attention, cast(inputs, torch.float32), softcap=5.0, impl="triton")
    with pytest.raises(ValueError, match="softcap: expected None"):
        run(gravity_attention_triton, cast(inputs, torch.float32), softcap=5.0)
    assert triton_refusal(torch.device(DEVICE), torch.float16) is None
    assert "512 wide" in triton_refusal(torch.device(DEVICE), torch.float16, width=512)


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "triton needs CUDA" in triton_refusal(torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("function", ["reciprocal", "power_of_two", "logarithm"])
def test_approximations_of_the_special_function_unit_stay_in_their_budget(function):
    """Against float64: reciprocal and power within 2 units in the last place, the logarithm within
    2^-21 absolutely, which is a relative 2^-21 of a weight for each unit of the exponent M^2."""
    from ops.special_functions import evaluate

    g = torch.Generator().manual_seed(0)
    if function == "power_of_two":
        x = (torch.rand(2**16, generator=g) - 0.5) * 200
    else:
        x = torch.exp((torch.rand(2**16, generator=g) - 0.5) * 60)
    exact = {"reciprocal": torch.reciprocal, "power_of_two": torch.exp2, "logarithm": torch.log2}
    expected = exact[function](x.double())
    error = (evaluate(function, x.cuda()).cpu().double() - expected).abs()
    if function == "logarithm":
        assert (error / expected.abs().clamp(min=1.0)).max() < 2**-21
    else:
        assert (error / expected.abs()).max() < 2 * 2**-23


@pytest.mark.gpu
def test_a_captured_graph_replays_forward_and_backward():
    inputs = moved(cast(make_inputs(queries=200, keys=200, width=64), torch.bfloat16))
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    names = list(leaves)

    def step():
        output = run(gravity_attention_triton, leaves, causal=True)
        return output, torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = step()
    with torch.no_grad():
        leaves["q"].mul_(0.5)
        leaves["mass"].add_(1.0)
    graph.replay()
    torch.cuda.synchronize()
    expected_output, expected = step()
    assert torch.equal(output, expected_output)
    for name, value, wanted in zip(names, gradients, expected, strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.gpu
def test_compiled_by_inductor_equals_eager():
    inputs = moved(cast(make_inputs(queries=200, keys=200, width=64), torch.bfloat16))
    compiled = torch.compile(
        lambda *tensors, **options: gravity_attention(*tensors, **options), fullgraph=True
    )
    expected = values_and_gradients(gravity_attention, inputs, causal=True)
    for name, value in values_and_gradients(compiled, inputs, causal=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_memory_of_a_long_forward_is_linear_and_small():
    """32768 tokens: less than 64 MB above inputs and output."""
    q = torch.randn(1, 16, 32768, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 2, 32768, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mass = torch.ones(16, device="cuda")
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = gravity_attention(q, k, v, mass, eps=0.1, causal=True, impl="triton")
        extra = torch.cuda.max_memory_allocated() - before - output.numel() * 2
    assert extra < 64 * 2**20
