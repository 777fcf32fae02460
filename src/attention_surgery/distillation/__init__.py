"""Attention distillation (Algorithm 1): learning φ for every block and rate from the teacher's trajectories."""

from .bank import FeatureMapBank
from .config import DistillConfig
from .loop import distill
from .measure import measure_errors
from .plan import DistillPlan, plan_distillation

__all__ = ["DistillConfig", "DistillPlan", "FeatureMapBank", "distill", "measure_errors", "plan_distillation"]
