"""The prior over codes: its loss, its padding, its samples, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, Trainer, TrainingArguments

from gravity_hf.models.geolip.modeling_prior import GeolipPrior

from .prior_cases import D, N, V, frames, lively_prior, prior_config


@pytest.fixture(scope="module")
def prior() -> GeolipPrior:
    return lively_prior()


def test_loss_is_the_squared_error_of_the_velocity(prior: GeolipPrior) -> None:
    clean, noise = frames(2), torch.randn(2, N, V, D)
    times = torch.tensor([0.0, 0.7])
    output = prior(clean, noise=noise, times=times)
    target, at = prior.normalize_frames(clean), times[:, None, None, None]
    noisy = (1 - at) * noise + at * target
    velocity = (prior.normalize_frames(output.prediction) - noisy) / (1 - at)
    torch.testing.assert_close(output.loss, F.mse_loss(velocity, target - noise))


def test_a_new_prior_guesses_each_coordinate_by_itself() -> None:
    prior = GeolipPrior(prior_config())
    prior.set_frame_statistics(frames(50))
    clean, noise = frames(20), torch.randn(20, N, V, D)
    start, end = (prior(clean, noise=noise, times=torch.full((20,), t)) for t in (0.0, 1.0))
    expected = frames(50).flatten(0, 1).mean(0).expand(20, N, V, D)
    torch.testing.assert_close(start.prediction, expected)
    torch.testing.assert_close(end.prediction, clean)


def test_padding_changes_nothing(prior: GeolipPrior) -> None:
    clean, noise, times = frames(2), torch.randn(2, N, V, D), torch.tensor([0.2, 0.5])
    mask = torch.ones(2, N, dtype=torch.long)
    mask[0, 4:] = 0
    other = clean.clone()
    other[0, 4:] = frames(1, 2, seed=9)
    first, second = (prior(x, mask, noise=noise, times=times) for x in (clean, other))
    assert first.loss == second.loss
    assert torch.equal(first.prediction[mask != 0], second.prediction[mask != 0])
    shorter = prior(clean[:1, :4], noise=noise[:1, :4], times=times[:1]).prediction
    torch.testing.assert_close(first.prediction[:1, :4], shorter)


def test_an_input_that_is_all_padding_leaves_loss_and_gradients_finite() -> None:
    prior = lively_prior()
    mask = torch.ones(2, N)
    mask[1] = 0
    with torch.no_grad():
        assert prior(frames(2), mask).loss.isfinite()
    prior.train()(frames(2), mask).loss.backward()
    assert all(p.grad.isfinite().all() for p in prior.parameters() if p.grad is not None)


def test_the_prediction_depends_on_the_time(prior: GeolipPrior) -> None:
    noisy = torch.randn(1, N, V, D).expand(2, N, V, D)
    start, end = prior.velocity(noisy, torch.tensor([0.0, 1.0]))
    # What the network adds to the part without it, which is -noisy and noisy.
    assert ((start + noisy[0]) - (end - noisy[1])).abs().max() > 1e-3


def test_a_token_sees_those_behind_it_too(prior: GeolipPrior) -> None:
    noisy = torch.randn(1, N, V, D)
    changed = noisy.clone()
    changed[:, -1] += 1
    before, after = (prior.velocity(x, torch.tensor([0.5])) for x in (noisy, changed))
    assert (before - after)[:, 0].abs().max() > 1e-4


def test_samples_lie_on_the_sphere_and_depend_on_the_seed_alone(prior: GeolipPrior) -> None:
    first = prior.sample(3, seed=1, steps=4)
    torch.manual_seed(99)
    again = prior.sample(3, seed=1, steps=4, batch_size=2)
    assert first.shape == (3, N, V, D) and first.dtype == torch.float32
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(3, N, V))
    torch.testing.assert_close(first, again)
    given = prior.sample(3, generator=torch.Generator().manual_seed(1), steps=4)
    assert torch.equal(first, given)
    assert not torch.allclose(first, prior.sample(3, seed=2, steps=4))


class Straight(GeolipPrior):
    """One that knows the one frame there is, and goes straight to it."""

    def velocity(self, noisy: Tensor, times: Tensor, attention_mask: Any = None) -> Tensor:
        return (frames(1, tokens=1) - noisy) / (1 - times)[:, None, None, None]


@pytest.mark.parametrize("steps", [1, 7])
def test_the_flow_ends_where_the_velocity_points(steps: int) -> None:
    sample = Straight(prior_config()).sample(2, seed=0, steps=steps)
    torch.testing.assert_close(sample, frames(1, tokens=1).expand(2, N, V, D))


def test_sampling_leaves_the_mode_as_it_was() -> None:
    prior = lively_prior(dropout=0.5).train()
    samples = [prior.sample(1, seed=0, steps=2) for _ in range(2)]
    assert prior.training and torch.equal(*samples)


def test_a_saved_prior_comes_back_bit_for_bit(prior: GeolipPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is GeolipPrior and loaded.config.num_tokens == N
    state, before = loaded.state_dict(), prior.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    torch.testing.assert_close(loaded.sample(2, seed=0, steps=3), prior.sample(2, seed=0, steps=3))


def test_half_precision_keeps_the_scale(prior: GeolipPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path)
    loaded = GeolipPrior.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.proj_in.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.scale.std, prior.scale.std)
    assert loaded(frames(2)).loss.dtype == torch.float32


def test_weights_that_a_file_lacks_are_made_new(prior: GeolipPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith(("scale", "proj_out"))}
    save_file(kept, file, metadata={"format": "pt"})
    loaded = GeolipPrior.from_pretrained(tmp_path)
    assert torch.equal(loaded.scale.std, torch.ones(V, D))
    assert not loaded.proj_out.weight.any() and not loaded.scale.mean.any()


def test_trainer_reports_the_loss_of_held_out_frames(tmp_path: Path) -> None:
    rows = [{"frames": x} for x in frames(4)]
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(lively_prior(), arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tokens": 0}, "num_tokens: expected an integer >= 1"),
        ({"base_dim": 1}, "base_dim: expected an integer >= 2"),
        ({"hidden_size": 15}, "a multiple of num_attention_heads"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        prior_config(**settings)


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ValueError, match="Did you mean num_rows"):
        prior_config(num_row=4)


@pytest.mark.parametrize(
    ("clean", "mask", "message"),
    [
        (torch.zeros(1, N + 1, V, D), None, f"N <= {N}"),
        (torch.zeros(1, N, V, D + 1), None, "GeolipPrior.frames"),
        (torch.zeros(1, N, V, D), torch.ones(1, N - 1), "attention_mask"),
    ],
)
def test_frames_that_do_not_fit_are_refused(
    prior: GeolipPrior, clean: Tensor, mask: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prior(clean, mask)


@pytest.mark.parametrize("how", [{"count": 0}, {"steps": 0}, {"num_tokens": N + 1}])
def test_samples_that_cannot_be_are_refused(prior: GeolipPrior, how: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"sample.{next(iter(how))}"):
        prior.sample(**{"count": 1, **how})


def test_a_seed_beside_a_generator_is_refused(prior: GeolipPrior) -> None:
    with pytest.raises(ValueError, match="got both"):
        prior.sample(1, seed=0, generator=torch.Generator())


def test_places_of_a_new_prior_are_as_large_as_what_it_makes_of_codes() -> None:
    prior = GeolipPrior(prior_config(hidden_size=64))
    codes = prior.proj_in(torch.randn(50, V * D)) - prior.proj_in.bias
    assert 0.5 < prior.places.weight.std() / codes.std() < 2
