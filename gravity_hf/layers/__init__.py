"""Modules shared by models and patched hosts."""

from .fusion import CrossGravitationalFusion
from .gravitational_attention import GravitationalAttentionHead, MultiHeadGravitationalAttention
from .positions import CurvedPositionEmbedding, FractalPositionEmbedding

__all__ = [
    "CrossGravitationalFusion",
    "CurvedPositionEmbedding",
    "FractalPositionEmbedding",
    "GravitationalAttentionHead",
    "MultiHeadGravitationalAttention",
]
