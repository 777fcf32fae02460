"""Attention distillation (Algorithm 1): learning φ for every block and rate from the teacher's trajectories."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .bank import FeatureMapBank as FeatureMapBank
    from .config import DistillConfig as DistillConfig
    from .loop import distill as distill
    from .measure import measure_errors as measure_errors
    from .plan import DistillPlan as DistillPlan
    from .plan import plan_distillation as plan_distillation
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        bank=["FeatureMapBank"],
        config=["DistillConfig"],
        loop=["distill"],
        measure=["measure_errors"],
        plan=["DistillPlan", "plan_distillation"],
    )
