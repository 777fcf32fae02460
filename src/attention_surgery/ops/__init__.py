"""The operator: `naive` (the formula), `eager` (PyTorch, linear memory), `hybrid` (the entry that chooses)."""

from . import naive
from .hybrid import hybrid_attention
from .tokens import softmax_token_mask

__all__ = ["hybrid_attention", "naive", "softmax_token_mask"]
