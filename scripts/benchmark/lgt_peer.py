"""What an LGT is timed against: a transformer encoder of the same sizes around torch's SDPA."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gravity_hf.models.lgt import LGTConfig


class SDPABlock(nn.Module):
    """Post-norm, as an LGT's: `x = norm1(x + attention(x)); x = norm2(x + ffn(x))`."""

    def __init__(self, config: LGTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.heads, self.causal = config.num_attention_heads, config.is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, T, d]` to the same."""
        # [3, B, H, T, h]
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))
        hidden = self.norm1(hidden + self.dropout(attended))
        inner = self.dropout(F.gelu(self.fc1(hidden)))
        return self.norm2(hidden + self.dropout(self.fc2(inner)))


class SDPAEncoder(nn.Module):
    """Token ids `[B, T]` to logits `[B, T, V]`: learned positions, an untied head without bias."""

    def __init__(self, config: LGTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(SDPABlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.embed_tokens(ids) + self.positions(places)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))
