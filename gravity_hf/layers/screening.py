"""Few dimensions of queries and keys, in which the keys worth attending to are looked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Screening(nn.Module):
    """Projections of queries and keys, `ds` wide, one pair for each key-value head.

    They are made from the queries and keys that attention itself uses, rotated where those are, so
    a cache of keys is all that a later step needs. Both start as one random orthonormal projection,
    which keeps products and distances up to a factor; `fit_principal` takes the directions in which
    keys differ most, and `gravity_hf.ops.sparse.screening_loss` trains them. No gradient goes on
    into the queries and keys.

    Args:
        query_heads: `H`. key_value_heads: `G`, a divisor. head_dim: `D`. screen_dim: `ds`, at most
            `D`.

    Parameters: `query` and `key` `[G, D, ds]`.
    """

    def __init__(
        self, query_heads: int, key_value_heads: int, head_dim: int, screen_dim: int
    ) -> None:
        super().__init__()
        if key_value_heads < 1 or query_heads % key_value_heads:
            raise ValueError(
                f"Screening.query_heads: expected a multiple of key_value_heads={key_value_heads}, "
                f"got {query_heads}"
            )
        if not 1 <= screen_dim <= head_dim:
            raise ValueError(
                f"Screening.screen_dim: expected 1 to head_dim={head_dim}, got {screen_dim}"
            )
        self.query_heads = query_heads
        self.key_value_heads = key_value_heads
        self.head_dim = head_dim
        self.screen_dim = screen_dim
        shape = (key_value_heads, head_dim, screen_dim)
        self.query = nn.Parameter(torch.empty(shape))
        self.key = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The same random orthonormal columns for queries and keys."""
        if self.key.is_meta:
            return
        start = torch.empty(self.key.shape, device=self.key.device)
        for head in start:
            nn.init.orthogonal_(head)
        self.key.copy_(start)
        self.query.copy_(start)

    @torch.no_grad()
    def fit_principal(self, keys: Tensor, mask: Tensor | None = None) -> None:
        """Both projections from the principal axes of keys `[B, G, T, D]`, the widest first.

        A direction in which all keys are the same adds the same to every score of a query, so the
        axes are those of what is left without the mean. mask: bool `[B, T]`, keys that count.

        Raises:
            ValueError: keys of another shape.
        """
        expected = (self.key_value_heads, self.head_dim)
        if keys.dim() != 4 or (keys.shape[1], keys.shape[3]) != expected:
            raise ValueError(
                f"Screening.fit_principal: keys: expected [B, {expected[0]}, T, {expected[1]}], "
                f"got {tuple(keys.shape)}"
            )
        samples = keys.transpose(0, 1).flatten(1, 2).double()
        count = samples.new_ones(samples.shape[1]) if mask is None else mask.flatten().double()
        weight = (count / count.sum().clamp(min=1.0))[None, :, None]
        centred = samples - (samples * weight).sum(1, keepdim=True)
        axes = torch.linalg.eigh(centred.mT @ (centred * weight)).eigenvectors
        start = axes.flip(-1)[..., : self.screen_dim]
        self.key.copy_(start)
        self.query.copy_(start)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`screen_q` `[B, H, Tq, ds]` and `screen_k` `[B, G, Tk, ds]` of q `[B, H, Tq, D]` and k
        `[B, G, Tk, D]`, in the dtype of q."""
        return self.screen_queries(q), self.screen_keys(k)

    def screen_queries(self, q: Tensor) -> Tensor:
        query = q.detach().unflatten(1, (self.key_value_heads, -1))
        return (query @ self.query.to(q.dtype).unsqueeze(1)).flatten(1, 2)

    def screen_keys(self, k: Tensor) -> Tensor:
        return k.detach() @ self.key.to(k.dtype)

    def extra_repr(self) -> str:
        return (
            f"query_heads={self.query_heads}, key_value_heads={self.key_value_heads}, "
            f"head_dim={self.head_dim}, screen_dim={self.screen_dim}"
        )
