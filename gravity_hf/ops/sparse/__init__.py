"""Attention to few keys: a cheap pass chooses them, an exact one attends to them."""

from .attention import sparse_attention
from .budget import KeyBudget
from .dense import dense_attention
from .distilling import screening_loss
from .scores import DotProduct, Gravity
from .selecting import Selection, block_means, select_keys
from .statistics import SelectionStatistics, selection_statistics

__all__ = [
    "DotProduct",
    "Gravity",
    "KeyBudget",
    "Selection",
    "SelectionStatistics",
    "block_means",
    "dense_attention",
    "screening_loss",
    "select_keys",
    "selection_statistics",
    "sparse_attention",
]
