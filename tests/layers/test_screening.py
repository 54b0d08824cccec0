"""Few dimensions in which keys are looked for."""

import pytest
import torch

from gravity_hf.layers.screening import Screening


def test_queries_and_keys_start_as_one_orthonormal_projection():
    screening = Screening(4, 2, 8, 3)
    assert torch.equal(screening.query, screening.key)
    assert not torch.equal(screening.key[0], screening.key[1])
    gram = screening.key.mT @ screening.key
    torch.testing.assert_close(gram, torch.eye(3).expand(2, 3, 3))


def test_query_heads_share_the_projection_of_their_keys():
    torch.manual_seed(0)
    screening = Screening(4, 2, 8, 3)
    k = torch.randn(1, 2, 5, 8)
    q = k.repeat_interleave(2, 1)
    screen_q, screen_k = screening(q, k)
    assert screen_q.shape == (1, 4, 5, 3)
    torch.testing.assert_close(screen_q, screen_k.repeat_interleave(2, 1))


def test_principal_axes_keep_what_keys_differ_in():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(2, 8, 8)).Q
    scales = torch.tensor([9.0, 7, 5, 0.1, 0.1, 0.1, 0.1, 0.1])
    # One direction all keys share, and padding that points anywhere.
    keys = torch.randn(3, 2, 60, 8) * scales @ axes.mT + 50 * axes[:, :, 7].unsqueeze(1)
    mask = torch.ones(3, 60, dtype=torch.bool)
    mask[1, :20] = False
    keys[1, :, :20] = 100 * torch.randn(2, 20, 8)
    screening = Screening(4, 2, 8, 3)
    screening.fit_principal(keys, mask)
    kept = torch.linalg.svdvals(axes[..., :3].mT @ screening.key)
    torch.testing.assert_close(kept, torch.ones(2, 3), atol=1e-3, rtol=0.0)
    assert torch.equal(screening.query, screening.key)


def test_no_gradient_goes_on_into_queries_and_keys():
    screening = Screening(2, 1, 4, 2)
    q, k = (torch.randn(1, h, 3, 4, requires_grad=True) for h in (2, 1))
    sum(x.sum() for x in screening(q, k)).backward()
    assert q.grad is None and k.grad is None
    assert screening.query.grad.abs().sum() > 0 and screening.key.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 2, 8, 4), "query_heads: expected a multiple of key_value_heads=2, got 3"),
        ((4, 2, 8, 9), "screen_dim: expected 1 to head_dim=8, got 9"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        Screening(*sizes)


def test_keys_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="expected .B, 1, T, 4., got"):
        Screening(2, 1, 4, 2).fit_principal(torch.zeros(1, 2, 3, 4))
