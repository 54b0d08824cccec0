"""Second moments of the inputs of modules, as a model runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gravity_hf.layers.calibration_inputs import calibration_batches
from gravity_hf.layers.input_moments import InputMoments, measure_inputs


class Towers(nn.Module):
    """Two maps of one input, one of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return self.three(self.one(x) * self.two(x))


def moments_of(model: Towers, *batches: Tensor) -> InputMoments:
    with InputMoments(dict(model.named_children())) as moments, torch.no_grad():
        for x in batches:
            model(x)
    return moments


def test_it_is_the_mean_of_outer_products_over_all_batches() -> None:
    model, batches = Towers(), [torch.randn(2, 7, 4), torch.randn(3, 2, 4)]
    moments = moments_of(model, *batches)
    rows = torch.cat([x.reshape(-1, 4) for x in batches]).double()
    torch.testing.assert_close(moments["one"], rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6)
    inner = (model.one(rows.float()) * model.two(rows.float())).double()
    torch.testing.assert_close(moments["three"], inner.mT @ inner / len(rows), rtol=1e-5, atol=1e-6)
    assert moments.tokens("three") == 20


def test_an_input_that_maps_share_is_summed_once() -> None:
    moments = moments_of(Towers(), torch.randn(2, 7, 4))
    assert moments.sums == 2
    assert torch.equal(moments["one"], moments["two"])


def test_padding_does_not_count() -> None:
    model, x = Towers(), torch.randn(2, 5, 4)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    with InputMoments(dict(model.named_children())) as moments:
        moments.real_tokens = lambda name: real
        model(torch.where(real[..., None], x, 1e3))
    rows = x[real].double()
    torch.testing.assert_close(moments["two"], rows.mT @ rows / 8, rtol=1e-5, atol=1e-6)


def test_the_model_is_as_before_afterwards() -> None:
    model = Towers().train()
    batches = [{"x": torch.randn(1, 3, 4)}]
    measure_inputs("f", model, {"one": model.one}, batches, real_tokens=lambda *_: None)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_module_that_nothing_reached_is_named() -> None:
    model = Towers()
    modules = {"one": model.one, "other": nn.Linear(4, 4)}
    with pytest.raises(ValueError, match="1 of 2 saw no token, such as other"):
        measure_inputs(
            "f", model, modules, [{"x": torch.randn(1, 3, 4)}], real_tokens=lambda *_: None
        )


def test_a_tensor_that_was_changed_in_place_is_another_input() -> None:
    one, two, x = nn.Linear(4, 5), nn.Linear(4, 5), torch.randn(3, 4)
    with InputMoments({"one": one, "two": two}) as moments:
        one(x)
        two(x.mul_(2))
    torch.testing.assert_close(moments["two"], 4 * moments["one"])


def test_maps_that_stop_sharing_an_input_are_refused() -> None:
    one, two, x = nn.Linear(4, 5), nn.Linear(4, 5), torch.randn(3, 4)
    with InputMoments({"one": one, "two": two}):
        one(x), two(x), one(x)
        with pytest.raises(ValueError, match="two: expected the inputs of one"):
            two(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("a text", "expected a list, got one text"),
        ([], "expected texts or batches, got none"),
        ([3], "got a int"),
        (["a text"], "tokenizer: expected the model's"),
    ],
)
def test_what_is_no_calibration_is_refused(calibration: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"f: .*{message}"):
        calibration_batches("f", calibration)  # type: ignore[arg-type]


def test_texts_without_a_token_are_refused() -> None:
    with pytest.raises(ValueError, match="f: calibration: expected texts with a token"):
        calibration_batches("f", ["", ""], lambda text, **_: {"input_ids": torch.zeros(1, 0)})
