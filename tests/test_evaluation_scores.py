"""VBench's and VBench-2.0's scores: the paper's own tables, the official constants, and what is refused."""

import math

import pytest

from attention_surgery.errors import EvaluationError
from attention_surgery.evaluation import vbench2_scores, vbench_scores
from attention_surgery.evaluation.vbench import QUALITY_RANGES, SEMANTIC_RANGES, VBENCH

TABLE_1 = [  # Total, Quality, Semantic
    (77.23, 80.14, 65.62),
    (81.91, 83.05, 77.33),
    (82.01, 82.72, 79.17),
    (79.76, 81.35, 73.39),
    (80.00, 82.30, 70.79),
    (81.14, 83.47, 71.84),
    (81.35, 83.73, 71.84),
    (81.45, 83.12, 74.76),
    (81.55, 82.48, 77.81),
    (81.72, 84.74, 69.62),
    (81.91, 83.36, 76.10),
    (83.31, 85.23, 75.65),
    (82.47, 83.33, 79.01),
    (82.40, 83.43, 78.28),
]
WAN = {  # Tables 7 to 9, Wan2.1 1.3B*
    "Human Identity": 63.5,
    "Dynamic Spatial Relationship": 25.1,
    "Complex Landscape": 16.4,
    "Instance Preservation": 86.0,
    "Multi-View Consistency": 9.6,
    "Human Clothes": 97.9,
    "Dynamic Attribute": 49.1,
    "Complex Plot": 11.3,
    "Mechanics": 72.4,
    "Human Anatomy": 80.6,
    "Composition": 48.4,
    "Human Interaction": 71.7,
    "Motion Rationality": 40.8,
    "Material": 69.4,
    "Diversity": 49.1,
    "Motion Order Understanding": 32.0,
    "Camera Motion": 32.1,
    "Thermotics": 61.7,
}
HYBRID = {  # 15×R2; Camera Motion is the one value that gives the printed group mean and total
    "Human Identity": 62.7,
    "Dynamic Spatial Relationship": 25.1,
    "Complex Landscape": 18.4,
    "Instance Preservation": 84.8,
    "Multi-View Consistency": 7.1,
    "Human Clothes": 97.1,
    "Dynamic Attribute": 44.0,
    "Complex Plot": 13.2,
    "Mechanics": 66.4,
    "Human Anatomy": 77.0,
    "Composition": 46.4,
    "Human Interaction": 70.3,
    "Motion Rationality": 41.4,
    "Material": 67.3,
    "Diversity": 48.5,
    "Motion Order Understanding": 33.7,
    "Camera Motion": 29.0,
    "Thermotics": 70.5,
}


def raw(quality: float = 0.8, semantic: float = 0.7) -> dict[str, float]:
    """Raw values that are `quality` and `semantic` after rescaling, in every dimension of the group."""
    values = {name: low + quality * (high - low) for name, (low, high) in QUALITY_RANGES.items()}
    return values | {name: low + semantic * (high - low) for name, (low, high) in SEMANTIC_RANGES.items()}


@pytest.mark.parametrize(("total", "quality", "semantic"), TABLE_1)
def test_totals_of_table_1(total, quality, semantic):
    scores = vbench_scores(raw(quality / 100, semantic / 100))
    assert scores.quality == pytest.approx(quality)
    assert scores.semantic == pytest.approx(semantic)
    assert scores.total == pytest.approx(total, abs=0.0075)  # three rounded figures


def test_one_value_of_each_constant():
    values = raw() | {"subject_consistency": 0.9634, "dynamic_degree": 0.65, "scene": 0.4, "temporal_style": 0.25}
    scores = vbench_scores(values)
    subject = (0.9634 - 0.1462) / (1 - 0.1462)
    assert scores.quality == pytest.approx(100 * (subject + 5 * 0.8 + 0.5 * 0.65) / 6.5)
    assert scores.semantic == pytest.approx(100 * (7 * 0.7 + 0.4 / 0.8222 + 0.25 / 0.364) / 9)
    assert scores.dimensions["subject_consistency"] == pytest.approx(96.34)
    assert scores.groups == {"Quality": scores.quality, "Semantic": scores.semantic}


def test_values_beyond_the_constants_are_not_clipped():
    scores = vbench_scores(raw() | {"motion_smoothness": 0.999, "overall_consistency": 0.4, "temporal_flickering": 0.5})
    flicker, smooth = (0.5 - 0.6293) / (1 - 0.6293), (0.999 - 0.706) / (0.9975 - 0.706)
    assert scores.quality == pytest.approx(100 * (flicker + smooth + 4.5 * 0.8) / 6.5)
    assert scores.semantic == pytest.approx(100 * (8 * 0.7 + 0.4 / 0.364) / 9)


def test_names_with_spaces_are_the_same():
    spaced = {name.replace("_", " ").title(): value for name, value in raw().items()}
    assert vbench_scores(spaced) == vbench_scores(raw())


def test_a_missing_dimension_is_not_zero():
    values = raw()
    del values["color"], values["scene"]
    with pytest.raises(EvaluationError, match=r"color, scene are missing\. A missing dimension is not a 0"):
        vbench_scores(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"i2v_subject": 0.5}, "VBench has no dimension 'i2v_subject'; expected one of aesthetic_quality"),
        ({"subject consistency": 0.9}, "'subject_consistency' is there twice"),
        ({"color": 81.2}, r"'color' is 81\.2; expected a number in \[0, 1\]; raw values are fractions"),
        ({"color": -0.2}, r"'color' is -0\.2; expected a number in \[0, 1\]"),
        ({"scene": math.nan}, "'scene' is nan"),
        ({"scene": None}, "'scene' is None"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(EvaluationError, match=message):
        vbench_scores(raw() | change)


def test_similarities_may_be_negative_and_rounding_is_forgiven():
    scores = vbench_scores(raw() | {"appearance_style": -0.01, "background_consistency": 1.0000001})
    assert scores.dimensions["appearance_style"] == -1.0


def test_tables_7_to_9_of_wan():
    scores = vbench2_scores(WAN)
    printed = {
        "Creativity": 48.7,
        "Commonsense": 63.4,
        "Controllability": 34.0,
        "Human Fidelity": 80.7,
        "Physics": 53.3,
    }
    assert scores.groups == pytest.approx(printed, abs=0.0501)
    assert scores.total == pytest.approx(56.0, abs=0.05)


def test_tables_7_to_9_of_the_hybrid():
    scores = vbench2_scores(HYBRID)
    assert scores.groups["Creativity"] == pytest.approx(47.5, abs=0.0501)
    assert scores.total == pytest.approx(55.1, abs=0.05)


def test_vbench2_rescales_nothing():
    fractions = vbench2_scores({name: value / 100 for name, value in WAN.items()})
    assert fractions.total == pytest.approx(vbench2_scores(WAN).total / 100)
    assert fractions.dimensions["Multi-View_Consistency"] == pytest.approx(0.096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Thermotics": 170.0}, r"'Thermotics' is 170\.0; expected a number in \[0, 100\]"),
        ({"Optics": 1.0}, "VBench-2.0 has no dimension 'Optics'"),
    ],
)
def test_vbench2_names_what_is_wrong(change, message):
    with pytest.raises(EvaluationError, match=message):
        vbench2_scores(WAN | change)
    with pytest.raises(EvaluationError, match="Human_Identity is missing"):
        vbench2_scores({name: value for name, value in WAN.items() if name != "Human Identity"})


def test_the_weights_sum_to_the_official_ones():
    best = VBENCH.aggregate({name: high for name, (_, high) in (QUALITY_RANGES | SEMANTIC_RANGES).items()})
    assert best == {"Quality": 1, "Semantic": 1, "Total": 1}
