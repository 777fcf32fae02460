"""Judging a converted model against its teacher: VBench, VBench-2.0, and the small world with its exact judge."""

from .config import EvaluateConfig
from .evaluate import EvaluationCost, estimate, evaluate
from .paired import Difference, compare
from .report import EvaluationReport, read_report
from .results import read_results
from .runner import setup_commands
from .sampling import SHAPES_SAMPLING, WAN_SAMPLING, SamplingConfig
from .suite import Scores, Suite
from .vbench import VBENCH, VBenchScores, vbench_scores
from .vbench2 import VBENCH2, vbench2_scores

__all__ = [
    "SHAPES_SAMPLING",
    "VBENCH",
    "VBENCH2",
    "WAN_SAMPLING",
    "Difference",
    "EvaluateConfig",
    "EvaluationCost",
    "EvaluationReport",
    "SamplingConfig",
    "Scores",
    "Suite",
    "VBenchScores",
    "compare",
    "estimate",
    "evaluate",
    "read_report",
    "read_results",
    "setup_commands",
    "vbench2_scores",
    "vbench_scores",
]
