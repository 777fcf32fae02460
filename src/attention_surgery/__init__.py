"""attention-surgery: hybrid attention for pretrained video diffusion transformers.

The flow reads: `bank = distill(...)` → `select_rates(bank.errors, block_costs(...), budget=0.6)` → `convert_` →
`bank.load_into_` → `finetune` → `save_pretrained`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ops as ops
    from . import shapes as shapes
    from .checkpoint import from_pretrained as from_pretrained
    from .checkpoint import push_to_hub as push_to_hub
    from .checkpoint import save_pretrained as save_pretrained
    from .cost import CostReport as CostReport
    from .cost import block_costs as block_costs
    from .cost import profile as profile
    from .distillation import DistillConfig as DistillConfig
    from .distillation import FeatureMapBank as FeatureMapBank
    from .distillation import distill as distill
    from .errors import SurgeryError as SurgeryError
    from .evaluation import vbench2_scores as vbench2_scores
    from .evaluation import vbench_scores as vbench_scores
    from .finetuning import FinetuneConfig as FinetuneConfig
    from .finetuning import finetune as finetune
    from .layers import FeatureMap as FeatureMap
    from .models import HybridConfig as HybridConfig
    from .models import HybridWanTransformer3DModel as HybridWanTransformer3DModel
    from .models import convert_ as convert_
    from .models import disabled as disabled
    from .models import revert_ as revert_
    from .ops import hybrid_attention as hybrid_attention
    from .ops import softmax_token_mask as softmax_token_mask
    from .rates import Rate as Rate
    from .selection import Selection as Selection
    from .selection import homogeneous_rates as homogeneous_rates
    from .selection import pareto_front as pareto_front
    from .selection import select_rates as select_rates
    from .teacher import tiny_wan as tiny_wan
else:
    from .lazy import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        "ops",
        "shapes",
        checkpoint=["from_pretrained", "push_to_hub", "save_pretrained"],
        cost=["CostReport", "block_costs", "profile"],
        distillation=["DistillConfig", "FeatureMapBank", "distill"],
        errors=["SurgeryError"],
        evaluation=["vbench2_scores", "vbench_scores"],
        finetuning=["FinetuneConfig", "finetune"],
        layers=["FeatureMap"],
        models=["HybridConfig", "HybridWanTransformer3DModel", "convert_", "disabled", "revert_"],
        ops=["hybrid_attention", "softmax_token_mask"],
        rates=["Rate"],
        selection=["Selection", "homogeneous_rates", "pareto_front", "select_rates"],
        teacher=["tiny_wan"],
    )
