"""Judging a converted model against its teacher: VBench, VBench-2.0, and the small world with its exact judge."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import EvaluateConfig as EvaluateConfig
    from .paired import Difference as Difference
    from .paired import compare as compare
    from .procedure import EvaluationCost as EvaluationCost
    from .procedure import estimate as estimate
    from .procedure import evaluate as evaluate
    from .report import EvaluationReport as EvaluationReport
    from .report import read_report as read_report
    from .results import read_results as read_results
    from .runner import setup_commands as setup_commands
    from .sampling import SHAPES_SAMPLING as SHAPES_SAMPLING
    from .sampling import WAN_SAMPLING as WAN_SAMPLING
    from .sampling import SamplingConfig as SamplingConfig
    from .suite import Scores as Scores
    from .suite import Suite as Suite
    from .vbench import VBENCH as VBENCH
    from .vbench import VBenchScores as VBenchScores
    from .vbench import vbench_scores as vbench_scores
    from .vbench2 import VBENCH2 as VBENCH2
    from .vbench2 import vbench2_scores as vbench2_scores
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        config=["EvaluateConfig"],
        procedure=["EvaluationCost", "estimate", "evaluate"],
        paired=["Difference", "compare"],
        report=["EvaluationReport", "read_report"],
        results=["read_results"],
        runner=["setup_commands"],
        sampling=["SHAPES_SAMPLING", "WAN_SAMPLING", "SamplingConfig"],
        suite=["Scores", "Suite"],
        vbench=["VBENCH", "VBenchScores", "vbench_scores"],
        vbench2=["VBENCH2", "vbench2_scores"],
    )
