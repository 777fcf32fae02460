"""Paired differences with intervals over prompts, and the report in its three forms."""

import csv
import io

import numpy as np
import pytest

from attention_surgery.errors import EvaluationError
from attention_surgery.evaluation import Difference, EvaluationReport, compare, read_report
from attention_surgery.evaluation.vbench import VBENCH


def draw(seed: int, shift: float, *, prompts: int = 40, videos: int = 5, spread: float = 0.1):
    """Values of both models; a prompt's difficulty is shared by its videos and by the models."""
    rng = np.random.default_rng(seed)
    teacher, student = {}, {}
    for p in range(prompts):
        level = rng.normal(0.5, 0.2)
        lean = rng.normal(shift, spread)
        teacher[f"p{p}"] = list(level + rng.normal(0, 0.02, videos))
        student[f"p{p}"] = list(level + lean + rng.normal(0, 0.02, videos))
    return {"color": teacher}, {"color": student}


def test_the_difference_is_that_of_the_scores():
    teacher = {"color": {"a": [1.0, 0.0], "b": [0.5]}}
    student = {"color": {"a": [1.0, 1.0], "b": []}}
    (row,) = compare(teacher, student)
    assert (row.teacher, row.student, row.difference) == (50.0, 100.0, 50.0)
    assert (row.prompts, row.videos) == (1, (3, 2))
    assert row.interval is None  # one prompt says nothing about others


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(100):
        (row,) = compare(*draw(seed, shift=-0.05), resamples=400, seed=seed)
        inside += row.interval[0] <= -5 <= row.interval[1]
    assert 88 <= inside <= 99


def test_videos_of_one_prompt_count_as_one():
    """Five times as many copies of the same videos must not narrow the interval."""
    teacher, student = draw(0, shift=0.02, videos=1)
    again = [
        {"color": {prompt: values * 5 for prompt, values in model["color"].items()}} for model in (teacher, student)
    ]
    (once,), (copied,) = compare(teacher, student), compare(*again)
    assert copied.interval == pytest.approx(once.interval)
    naive = 1.96 * np.std([100 * d for d in np.subtract(*[list(m["color"].values()) for m in (student, teacher)])])
    assert np.ptp(once.interval) == pytest.approx(2 * naive / 40**0.5, rel=0.15)


def test_the_same_seed_gives_the_same_interval_and_resampling_is_paired():
    teacher, student = draw(1, shift=0.0)
    assert compare(teacher, student, seed=3) == compare(teacher, student, seed=3)
    assert compare(teacher, student, seed=3) != compare(teacher, student, seed=4)
    (row,) = compare(teacher, teacher)
    assert row.interval == (0.0, 0.0)  # prompts differ a lot, the models not at all


def test_groups_are_scored_in_every_resample():
    rng = np.random.default_rng(0)

    def model(shift):
        return {
            name: {f"{name}{p}": [float(np.clip(rng.normal(0.7 + shift, 0.1), 0, 1))] for p in range(20)}
            for name in VBENCH.dimensions
        }

    teacher, student = model(0.0), model(-0.1)
    rows = {row.name: row for row in compare(teacher, student, aggregate=VBENCH.aggregate, resamples=2000)}
    assert list(rows)[-3:] == ["Quality", "Semantic", "Total"]
    assert [rows[name].kind for name in ("color", "Quality", "Total")] == ["dimension", "group", "total"]
    total = rows["Total"]
    assert total.difference == pytest.approx((4 * rows["Quality"].difference + rows["Semantic"].difference) / 5)
    low, high = total.interval
    assert low < total.difference < high
    assert high - low < rows["Semantic"].interval[1] - rows["Semantic"].interval[0]


def test_a_dimension_with_few_prompts_leaves_no_interval_for_the_total():
    def model(count):
        return {name: {f"{name}{p}": [0.5] for p in range(count)} for name in VBENCH.dimensions}

    rows = compare(model(3) | {"scene": {"s": [0.4]}}, model(3) | {"scene": {"s": [0.5]}}, aggregate=VBENCH.aggregate)
    known = {row.name: row.interval is not None for row in rows}
    assert known["color"] and not known["scene"] and not known["Total"]


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({"color": {"a": [1]}}, {"scene": {"a": [1]}}, "the student has no values for 'color'"),
        ({"color": {"a": [1]}}, {"color": {"a": [1], "b": [1]}}, "the teacher lacks 1 prompts of 'color', .* 'b'"),
        ({"color": {"a": [1]}}, {"color": {"a": []}}, "no video of the student has a value for 'color'"),
    ],
)
def test_models_that_do_not_match_are_refused(teacher, student, message):
    with pytest.raises(EvaluationError, match=message):
        compare(teacher, student)


@pytest.fixture
def report():
    rows = (
        Difference(
            name="subject_consistency",
            kind="dimension",
            teacher=96.0,
            student=95.5,
            difference=-0.5,
            interval=(-1.25, 0.25),
            prompts=72,
            videos=(360, 360),
        ),
        Difference(name="Total", kind="total", teacher=83.31, student=83.0, difference=-0.31, interval=None),
    )
    return EvaluationReport(
        suite="VBench",
        teacher="Wan2.1 | 1.3B",
        student="15×R2",
        rows=rows,
        confidence=0.95,
        settings={"prompts": 944},
        notes=("color: 3 of 425 videos could not be judged",),
    )


def test_the_report_as_markdown(report):
    text = report.to_markdown()
    assert text.startswith("# VBench: 15×R2 against Wan2.1 \\| 1.3B\n")
    assert "| subject consistency | 96.00 | 95.50 | -0.50 | -1.25 to +0.25 | 72 |" in text
    assert "| **Total** | **83.31** | **83.00** | **-0.31** | **–** |  |" in text
    assert "- prompts: 944" in text and "- color: 3 of 425 videos" in text


def test_the_report_as_csv_and_json(report, tmp_path):
    report.write(tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert [float(rows[0][name]) for name in ("teacher", "student", "low", "high")] == [96.0, 95.5, -1.25, 0.25]
    assert (rows[1]["kind"], rows[1]["low"], rows[1]["prompts"]) == ("total", "", "")
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == report
    assert (tmp_path / "report.md").read_text() == str(report)


@pytest.mark.parametrize(
    ("document", "message"),
    [("{", "cannot be read"), ("[]", "is no evaluation report"), ('{"format": 9}', "of format 9; expected 1")],
)
def test_other_files_are_no_reports(tmp_path, document, message):
    (tmp_path / "report.json").write_text(document)
    with pytest.raises(EvaluationError, match=message):
        read_report(tmp_path)
