"""attention-surgery: hybrid attention for pretrained video diffusion transformers."""

from . import ops
from .layers import FeatureMap
from .models import HybridConfig, HybridWanTransformer3DModel, convert_, disabled, revert_
from .ops import hybrid_attention, softmax_token_mask
from .rates import Rate

__all__ = [
    "FeatureMap",
    "HybridConfig",
    "HybridWanTransformer3DModel",
    "Rate",
    "convert_",
    "disabled",
    "hybrid_attention",
    "ops",
    "revert_",
    "softmax_token_mask",
]
