"""The ordinary attention of the twins that an NGT is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.exporting import is_exporting
from ..visibility import Visibility
from .attention import AttentionResult
from .configuration_ngt import NGTConfig


class DotProductAttention(nn.Module):
    """`out_proj softmax(q k^T / sqrt(D / H)) v`, causal, with dropout on the weights.

    Children: `q_proj`, `k_proj`, `v_proj`, `out_proj`, each `[D, D]` with a bias.

    With `config.positions == "alibi"` a key that stands `n` tokens before the query loses
    `n slope_h` (Press et al., "Train Short, Test Long"). Tokens are counted as they stand in the
    row, so that padding at either end, packed documents and caches change nothing. The bias is a
    tensor `[1, H, Tq, Tk]` in the precision of the queries, beside which PyTorch has no flash
    kernel: it takes its memory-efficient one, or cuDNN's. FlexAttention would need no such tensor,
    but has no dropout.
    """

    def __init__(self, config: NGTConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.dropout = float(config.dropout)
        self.has_alibi = config.positions == "alibi"
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        geometry: None,
        visible: Visibility,
        cache: Any = None,
        output_attentions: bool = False,
    ) -> AttentionResult:
        """`hidden` `[B, T, D]`, normed; `geometry`: None, as there is none; `cache`: gets this
        layer's keys and values, gives all of them."""
        q, k, v = (self._heads(x(hidden)) for x in (self.q_proj, self.k_proj, self.v_proj))
        places = None
        if cache is not None:
            # Before the update, which counts on in place.
            places = torch.arange(q.shape[2], device=q.device)
            places = places + cache.get_seq_length(self.layer_idx)
            k, v = cache.update(k, v, self.layer_idx)
        bias, is_causal = self._bias(q, k.shape[2], visible, places)
        weights = None
        if output_attentions:
            weights = dot_product_weights(q, k, bias, is_causal)
        gathered = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
        )
        return AttentionResult(self.out_proj(gathered.transpose(1, 2).flatten(2)), weights)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _bias(
        self, q: Tensor, keys: int, visible: Visibility, places: Tensor | None
    ) -> tuple[Tensor | None, bool]:
        """What is added to the scores, or which of them count; and whether the kernel sees to
        causality by itself."""
        queries = q.shape[2]
        plain = visible.mask is None and visible.key_ranges is None and not self.has_alibi
        if plain and (not visible.causal or queries == 1):
            return None, False
        if plain and queries == keys:
            return None, True
        key = torch.arange(keys, device=q.device)
        query = key[keys - queries :] if places is None else places
        ahead = key - query[:, None]
        seen = (ahead <= 0)[None, None] if visible.causal else None
        if visible.key_ranges is not None:
            start, stop = visible.key_ranges[:, None, :, :, None].unbind(3)
            seen = _both(seen, (start <= key) & (key < stop))
        added, shown = _split_mask(visible.mask)
        seen = _both(seen, shown)
        if self.has_alibi:
            slopes = alibi_slopes(self.heads, q.device)
            alibi = slopes[:, None, None] * ahead.clamp(max=0)
            added = alibi[None] if added is None else alibi + added
        if added is None:
            return seen, False
        if seen is not None:
            # Other runtimes make NaN of a row that is -inf throughout, such as padding's.
            hidden = torch.finfo(q.dtype).min if is_exporting() else float("-inf")
            added = added.masked_fill(~seen, hidden)
        return added.to(q.dtype), False


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """`[H]`, float32: `2^(-8 h / H)`, h from 1, where H is a power of two.

    For other H as Press et al. have it: those of the next smaller power of two, `n`, and then every
    second of `2 n`, beginning with the first.
    """
    power = 1 << (heads.bit_length() - 1)
    index = torch.arange(heads, device=device, dtype=torch.float32)
    # Computed where they are used: a copy from the host would wait for the device.
    steps = torch.where(index < power, index + 1, index - power + 0.5)
    return torch.exp2(-8.0 / power * steps)


def dot_product_weights(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    """`[B, H, Tq, Tk]` in the dtype of q; rows that see nothing are 0, as in the kernels."""
    score = (q.float() @ k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
    if is_causal:
        bias = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if bias is not None and bias.dtype == torch.bool:
        score = score.masked_fill(~bias, float("-inf"))
    elif bias is not None:
        score = score + bias
    weights = score.softmax(-1)
    return weights.masked_fill(score.amax(-1, keepdim=True).isinf(), 0.0).to(q.dtype)


def _split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What a mask adds to scores, and which scores it shows; lowest values hide, as elsewhere."""
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        return None, mask
    return mask, mask > torch.finfo(mask.dtype).min / 2


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b
