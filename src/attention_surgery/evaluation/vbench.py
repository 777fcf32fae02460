"""VBench (Huang et al., CVPR 2024): sixteen dimensions, rescaled, in two groups.

Constants and formulas: `scripts/constant.py` and `scripts/cal_final_score.py` of Vchitect/VBench.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .suite import Scores, Suite

QUALITY_RANGES = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
    "dynamic_degree": (0.0, 1.0),
}
SEMANTIC_RANGES = {
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""Lowest and highest raw value, which become 0 and 1. Values beyond are not clipped."""

WEIGHTS = {"dynamic_degree": 0.5}
"""Every other dimension weighs 1 in its group."""


@dataclass(frozen=True, kw_only=True)
class VBenchScores(Scores):
    """VBench's scores, in %."""

    @property
    def quality(self) -> float:
        return self.groups["Quality"]

    @property
    def semantic(self) -> float:
        return self.groups["Semantic"]


def vbench_scores(raw: Mapping[str, float]) -> VBenchScores:
    """VBench's Quality, Semantic and Total.

    score_d = (raw_d - min_d) / (max_d - min_d); Quality and Semantic are the weighted means over their dimensions;
    Total = (4 Quality + Semantic) / 5.

    Args:
        raw: value of all sixteen dimensions as the official tools write it, a fraction, not a percentage. Names with
            underscores or spaces.

    Returns:
        Everything in %; `.dimensions` are the raw values, as tables print them, not the rescaled ones.

    Raises:
        EvaluationError: a dimension is missing, unknown or outside its range; it is named.
    """
    values = VBENCH.complete(raw)
    groups = aggregate(values)
    total = groups.pop("Total")
    return VBenchScores(
        dimensions={name: 100 * value for name, value in values.items()},
        groups={name: 100 * value for name, value in groups.items()},
        total=100 * total,
    )


def aggregate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Quality, Semantic and Total from raw values, numbers or arrays, all in [0, 1]."""
    quality, semantic = _group(values, QUALITY_RANGES), _group(values, SEMANTIC_RANGES)
    return {"Quality": quality, "Semantic": semantic, "Total": (4 * quality + semantic) / 5}


def _group(values: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]]) -> Any:
    weights = {name: WEIGHTS.get(name, 1.0) for name in ranges}
    scores = (weights[name] * (values[name] - low) / (high - low) for name, (low, high) in ranges.items())
    return sum(scores) / sum(weights.values())


VBENCH = Suite(
    name="vbench",
    title="VBench",
    package="vbench",
    evaluator="VBench",
    info_file="VBench_full_info.json",
    dimensions=(*QUALITY_RANGES, *SEMANTIC_RANGES),
    samples=5,
    folder_per_dimension=False,
    name_length=None,
    aggregate=aggregate,
    percent=frozenset({"imaging_quality"}),
    signed=frozenset({"aesthetic_quality", "appearance_style", "temporal_style", "overall_consistency"}),
    selective=frozenset({"color"}),
)
