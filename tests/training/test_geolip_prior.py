"""A trained prior: it learns how tokens go together, and the same seed gives the same prior."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.geolip.configuration_prior import GeolipPriorConfig
from gravity_hf.models.geolip.modeling_prior import GeolipPrior
from gravity_hf.training.geolip.prior import train_prior

N, V, D = 4, 3, 2


def new_prior(hidden_size: int = 32) -> GeolipPrior:
    torch.manual_seed(0)
    sizes = {"num_tokens": N, "num_rows": V, "base_dim": D, "hidden_size": hidden_size}
    return GeolipPrior(GeolipPriorConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))


def two_kinds(count: int) -> Tensor:
    """Inputs whose tokens are all of one kind, or all of the other: `[count, N, V, d]`."""
    generator = torch.Generator().manual_seed(1)
    kinds = F.normalize(torch.randn(2, 1, V, D, generator=generator), dim=-1)
    which = torch.arange(count) % 2
    spread = 0.05 * torch.randn(count, N, V, D, generator=generator)
    return F.normalize(kinds[which] + spread, dim=-1)


def test_tokens_of_a_sample_go_together() -> None:
    frames, prior = two_kinds(64), new_prior()
    losses = train_prior(prior, frames, steps=250, batch_size=32, lr=3e-3)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    kinds = frames[:2].mean(1).flatten(1)
    nearest = torch.cdist(prior.sample(60, seed=0, steps=20).flatten(2), kinds)
    assert nearest.min(-1).values.mean() < 0.4
    which = nearest.argmin(-1)
    assert (which == which[:, :1]).all(-1).float().mean() > 0.9
    assert 0.2 < which.float().mean() < 0.8


def test_the_same_seed_gives_the_same_prior() -> None:
    found = []
    for global_seed in (0, 7):
        prior = new_prior(hidden_size=8)
        torch.manual_seed(global_seed)
        train_prior(prior, two_kinds(8), steps=3, batch_size=4, seed=5)
        found.append(torch.cat([p.flatten() for p in prior.parameters()]))
    assert torch.equal(*found)


def test_padding_is_not_learned() -> None:
    frames = two_kinds(8)
    mask = torch.ones(8, N, dtype=torch.long)
    mask[:, 2:] = 0
    found = []
    for filling in (frames, frames.roll(1, 0)):
        prior = new_prior(hidden_size=8)
        mixed = torch.where(mask[..., None, None] != 0, frames, filling)
        found.append(train_prior(prior, mixed, steps=3, batch_size=4, attention_mask=mask))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 9}, "expected 1 to 8"),
        ({"steps": 0}, "at least 1 and 0"),
        ({"lr": 0.0}, "a finite rate above 0"),
    ],
)
def test_settings_outside_their_range_are_refused(how: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_prior(new_prior(8), two_kinds(8), **{"steps": 1, "batch_size": 4, **how})


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    prior = new_prior(8)
    torch.nn.init.constant_(prior.proj_out.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="got nan at step 0"):
        train_prior(prior, two_kinds(8), steps=2, batch_size=4)
