"""attention-surgery: hybrid attention for pretrained video diffusion transformers."""

from . import ops
from .layers import FeatureMap
from .ops import hybrid_attention, softmax_token_mask
from .rates import Rate

__all__ = ["FeatureMap", "Rate", "hybrid_attention", "ops", "softmax_token_mask"]
