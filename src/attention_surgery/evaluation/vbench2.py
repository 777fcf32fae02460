"""VBench-2.0 (Zheng et al., 2025): eighteen dimensions in five groups, no rescaling.

Groups: `VBench-2.0/scripts/constant.py` of Vchitect/VBench.
"""

from collections.abc import Mapping
from typing import Any

from .suite import Scores, Suite

GROUPS = {
    "Creativity": ("Composition", "Diversity"),
    "Commonsense": ("Instance_Preservation", "Motion_Rationality"),
    "Controllability": (
        "Camera_Motion",
        "Complex_Landscape",
        "Complex_Plot",
        "Dynamic_Attribute",
        "Dynamic_Spatial_Relationship",
        "Human_Interaction",
        "Motion_Order_Understanding",
    ),
    "Human Fidelity": ("Human_Anatomy", "Human_Clothes", "Human_Identity"),
    "Physics": ("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
}
SELECTIVE = frozenset(
    {
        "Human_Clothes",
        "Human_Identity",
        "Material",
        "Mechanics",
        "Motion_Order_Understanding",
        "Multi-View_Consistency",
        "Thermotics",
    }
)
"""Dimensions that answer -1 for a video that does not show what they ask about, and leave it out of their mean."""


def vbench2_scores(values: Mapping[str, float]) -> Scores:
    """VBench-2.0's five groups, each the mean of its dimensions, and Total, the mean of the groups.

    Args:
        values: of all eighteen dimensions, as fractions or in %. Names with underscores or spaces.

    Returns:
        Scores in the unit of `values`: nothing is rescaled.

    Raises:
        EvaluationError: a dimension is missing, unknown or outside [0, 100]; it is named.
    """
    dimensions = VBENCH2.complete(values, upper=100.0)
    groups = aggregate(dimensions)
    total = groups.pop("Total")
    return Scores(dimensions=dimensions, groups=groups, total=total)


def aggregate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The groups and Total from values, numbers or arrays."""
    groups = {group: sum(values[name] for name in names) / len(names) for group, names in GROUPS.items()}
    return groups | {"Total": sum(groups.values()) / len(groups)}


VBENCH2 = Suite(
    name="vbench2",
    title="VBench-2.0",
    package="vbench2",
    evaluator="VBench2",
    info_file="VBench2_full_info.json",
    dimensions=tuple(name for names in GROUPS.values() for name in names),
    samples=3,
    more_samples={"Diversity": 20},
    folder_per_dimension=True,
    name_length=180,
    aggregate=aggregate,
    selective=SELECTIVE,
    joint=frozenset({"Diversity"}),
)
