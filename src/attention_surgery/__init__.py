"""attention-surgery: hybrid attention for pretrained video diffusion transformers.

The flow reads: `bank = distill(...)` → `select_rates(bank.errors, block_costs(...), budget=0.6)` → `convert_` →
`bank.load_into_` → `finetune` → `save_pretrained`.
"""

from . import ops, shapes
from .checkpoint import from_pretrained, push_to_hub, save_pretrained
from .cost import CostReport, block_costs, profile
from .distillation import DistillConfig, FeatureMapBank, distill
from .errors import SurgeryError
from .evaluation import vbench2_scores, vbench_scores
from .finetuning import FinetuneConfig, finetune
from .layers import FeatureMap
from .models import HybridConfig, HybridWanTransformer3DModel, convert_, disabled, revert_
from .ops import hybrid_attention, softmax_token_mask
from .rates import Rate
from .selection import Selection, homogeneous_rates, pareto_front, select_rates
from .teacher import tiny_wan

__all__ = [
    "CostReport",
    "DistillConfig",
    "FeatureMap",
    "FeatureMapBank",
    "FinetuneConfig",
    "HybridConfig",
    "HybridWanTransformer3DModel",
    "Rate",
    "Selection",
    "SurgeryError",
    "block_costs",
    "convert_",
    "disabled",
    "distill",
    "finetune",
    "from_pretrained",
    "homogeneous_rates",
    "hybrid_attention",
    "ops",
    "pareto_front",
    "profile",
    "push_to_hub",
    "revert_",
    "save_pretrained",
    "select_rates",
    "shapes",
    "softmax_token_mask",
    "tiny_wan",
    "vbench2_scores",
    "vbench_scores",
]
