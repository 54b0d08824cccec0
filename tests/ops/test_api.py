"""What `gravity_attention` accepts, refuses and chooses."""

import pytest
import torch
from ops.operator_cases import cast, make_inputs, run

from gravity_hf.ops import api, gravity_attention


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"law": "newton"}, "law: expected one of .*'force', 'power'.*, got newton"),
        ({"impl": "magic"}, "impl: expected one of .*, got magic"),
        ({"dropout_p": 1.0}, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": -1}, "eps must be positive, got -1"),
        ({"eps": torch.ones(3)}, r"eps must be a number or \[H\] = \(4,\), got \(3,\)"),
        ({"q": torch.ones(2, 3)}, r"q: expected 4 dimensions .*, got \(2, 3\)"),
        ({"k": torch.ones(2, 2, 11, 6).int()}, "k: expected a floating dtype, got torch.int32"),
        ({"v": torch.ones(2, 2, 11, 6)}, "v: expected the dtype of q, torch.float64"),
        ({"k": torch.ones(2, 3, 11, 6).double()}, r"k: expected \[2, a divisor of 4, Tk, 6\]"),
        ({"v": torch.ones(2, 2, 10, 6).double()}, r"v: expected \[2, 2, 11, Dv\]"),
        ({"mass": torch.ones(2).double()}, r"mass: expected \[4\], got \(2,\)"),
        ({"key_radius_sq": torch.ones(4)}, r"key_radius_sq: expected \[2\], got \(4,\)"),
        ({"query_mass": torch.ones(2, 4, 8)}, r"query_mass: expected \[B, H, Tq\], got"),
        ({"query_mass": torch.ones(2, 4, 9), "law": "power"}, "query_mass: expected law='force'"),
        ({"key_mass": torch.ones(2, 2, 11)}, r"key_mass: expected \[B, H, Tk\], got"),
        ({"mask": torch.ones(9, 11).int()}, "mask: expected bool .* or float"),
        ({"mask": torch.ones(9, 10)}, r"mask: expected broadcastable to \(2, 4, 9, 11\), got"),
        ({"mask": torch.ones(1, 1, 1, 9, 11)}, "mask: expected broadcastable to"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_what_was_expected_and_what_came(changes, message):
    with pytest.raises(ValueError, match="^gravity_attention: " + message):
        run(gravity_attention, {**make_inputs(), **changes})


def test_eps_may_be_a_number_an_integer_or_a_tensor():
    inputs = make_inputs()
    inputs["eps"] = torch.ones(4).double()
    expected = run(gravity_attention, inputs)
    for eps in (1, 1.0):
        assert torch.equal(run(gravity_attention, {**inputs, "eps": eps}), expected)


@pytest.mark.parametrize("impl", ["reference", "chunked", "flex"])
def test_a_named_implementation_is_the_only_one_called(impl, monkeypatch):
    called = []

    def refuse(name):
        def stand_in(*args, **options):
            called.append(name)
            raise ValueError(name)

        return stand_in

    for name in ("reference", "chunked", "flex"):
        monkeypatch.setattr(api, f"gravity_attention_{name}", refuse(name))
    with pytest.raises(ValueError, match=impl):
        run(gravity_attention, make_inputs(), impl=impl)
    assert called == [impl]


def test_a_refusal_of_flex_reaches_the_caller():
    with pytest.raises(ValueError, match="impl='flex' expects float32"):
        run(gravity_attention, make_inputs(), impl="flex")


class _Cuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU: the choice depends on nothing else of the device."""

    device = torch.device("cuda")


def test_auto_chooses_flex_only_for_plain_inference_on_a_gpu(monkeypatch):
    q = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16).as_subclass(_Cuda)
    leaf = torch.ones(1, requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    choose = api.choose_implementation
    assert choose(q, None, 0.0) == "flex"
    assert choose(torch.ones(1, 1, 2, 4, dtype=torch.bfloat16), None, 0.0) == "chunked"
    assert choose(q.float().as_subclass(_Cuda), None, 0.0) == "chunked"
    assert choose(q.double().as_subclass(_Cuda), None, 0.0) == "chunked"
    assert choose(q, mask, 0.0) == "chunked"
    assert choose(q, None, 0.1) == "chunked"
    assert choose(q, None, 0.0, (leaf, None, "force")) == "chunked"
    with torch.no_grad():
        assert choose(q, None, 0.0, (leaf,)) == "flex"
    assert choose(q[:, :, :0], None, 0.0) == "chunked"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose(q, None, 0.0) == "chunked"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_has_the_dtype_and_shape_of_the_values(dtype):
    output = run(gravity_attention, cast(make_inputs(value_width=3), dtype))
    assert output.dtype == dtype
    assert output.shape == (2, 4, 9, 3)
