"""Table 2 of votes: the paper's own counts, known intervals, clustering, equivalence, and the files."""

import csv
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from attention_surgery.errors import StudyError
from attention_surgery.study import StudyConfig, StudyReportConfig, study_report
from attention_surgery.study.statistics import (
    adjust_holm,
    describe_counts,
    equivalence_p_value,
    percentile_interval,
    resample_net,
    wilson_interval,
)
from attention_surgery.study.store import Outcome, StudyStore, Vote
from attention_surgery.study.summary import summarise_votes
from attention_surgery.study.videos import Pair

TOTALS = {"ours_name": "15xR2", "baseline_name": "Wan2.1", "margin": 0.15}


def make_votes(counts: dict[str, tuple[int, int, int]], *, raters: int = 11, prompts: int = 5) -> list[Vote]:
    """Wins, ties and losses per dimension, spread over raters and each dimension's own prompts."""
    votes = []
    for dimension, (wins, ties, losses) in counts.items():
        outcomes: list[Outcome] = [*["ours"] * wins, *["tie"] * ties, *["baseline"] * losses]
        for index, outcome in enumerate(np.random.default_rng(0).permutation(outcomes).tolist()):
            prompt = f"{dimension} {index % prompts}"
            votes.append(
                Vote(
                    rater=f"rater {index // prompts % raters}",
                    name=f"{prompt}.mp4",
                    prompt=prompt,
                    dimensions=(dimension,),
                    outcome=outcome,
                    side="none" if outcome == "tie" else ("left", "right")[index % 2],
                    shown_at="2025-01-01T00:00:00.000+00:00",
                    voted_at="2025-01-01T00:00:09.000+00:00",
                )
            )
    return votes


def test_the_papers_562_votes():
    """Table 2's total, 31.0 / 39.7 / 29.3 of 562: 174 / 223 / 165."""
    found = describe_counts(174, 223, 165)
    shares = [round(100 * share, 1) for share in (found.win_share, found.tie_share, found.loss_share)]
    assert found.votes == 562 and shares == [31.0, 39.7, 29.4]  # 29.36: the paper's 29.3 makes its row sum to 100
    assert round(found.p_value, 2) == 0.66
    assert round(100 * found.win_rate, 1) == 51.3
    assert [round(100 * bound, 1) for bound in found.win_rate_interval] == [46.0, 56.6]
    report = str(summarise_votes(make_votes({"all": (174, 223, 165)}), **TOTALS))
    assert "| **Total** | **31.0** | **39.7** | **29.4** | **562** |" in report
    assert "No difference detected, which is not yet equality: without ties, 15xR2 wins 51.3 [46.0, 56.6] %" in report
    assert "(exact p = 0.66" in report


def test_wilson_interval_solves_its_equation():
    """Its bounds p are where |count/n - p| = z sqrt(p (1 - p) / n)."""
    for count, total in ((0, 7), (3, 10), (51, 562), (9, 9)):
        low, high = wilson_interval(count, total, confidence=0.95)
        for bound in (low, high):
            gap = abs(count / total - bound)
            assert gap == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / total), abs=1e-6)
        assert 0 <= low <= count / total <= high <= 1


def test_exact_test_and_all_ties():
    assert describe_counts(5, 100, 0).p_value == pytest.approx(2 / 2**5)
    assert describe_counts(1, 0, 1).p_value == 1
    ties = describe_counts(0, 8, 0)
    assert (ties.win_rate, ties.win_rate_interval, ties.p_value) == (None, None, None) and ties.tie_share == 1


def test_holm_adjusts_in_order_and_never_above_one():
    assert adjust_holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.06, None, 0.03, 0.06])
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0] and adjust_holm([]) == []


def simulate(rng: np.random.Generator, raters: int, prompts: int, rater_effect: float, prompt_effect: float):
    """A crossed study without a true preference; votes lean with their rater and their prompt."""
    rater, prompt = (grid.ravel() for grid in np.meshgrid(range(raters), range(prompts), indexing="ij"))
    lean = rater_effect * rng.normal(size=raters)[rater] + prompt_effect * rng.normal(size=prompts)[prompt]
    return np.sign(np.round(lean + rng.normal(size=lean.size))).astype(np.int64), rater, prompt


def covers_zero(interval: Sequence[float]) -> bool:
    return interval[0] <= 0 <= interval[1]


def test_clustered_interval_covers_where_the_naive_one_does_not():
    rng = np.random.default_rng(0)
    clustered = naive = 0
    for _ in range(200):
        outcomes, rater, prompt = simulate(rng, 12, 20, 0.5, 0.7)
        resampled = resample_net(outcomes, rater, prompt, resamples=400, rng=rng)
        clustered += covers_zero(percentile_interval(resampled, confidence=0.95))
        half = 1.96 * outcomes.std() / np.sqrt(outcomes.size)
        naive += covers_zero((outcomes.mean() - half, outcomes.mean() + half))
    assert naive < 150 < 182 <= clustered


def test_bootstrap_agrees_with_the_two_way_variance_and_ignores_numbering():
    rng = np.random.default_rng(1)
    outcomes, rater, prompt = simulate(rng, 30, 40, 1.0, 1.0)
    resampled = resample_net(outcomes, rater, prompt, resamples=4000, rng=np.random.default_rng(2))
    table = outcomes.reshape(30, 40)
    two_way = table.mean(1).var(ddof=1) / 30 + table.mean(0).var(ddof=1) / 40
    assert resampled.mean() == pytest.approx(outcomes.mean(), abs=0.02)
    assert resampled.var() == pytest.approx(two_way, rel=0.15)
    spread = resample_net(outcomes, 2 * rater, 3 * prompt + 1, resamples=4000, rng=np.random.default_rng(2))
    assert np.array_equal(resampled, spread)


def test_bootstrap_of_sparse_votes_draws_empty_resamples_again():
    ones = np.ones(3, np.int64)
    resampled = resample_net(ones, np.arange(3), np.arange(3), resamples=500, rng=np.random.default_rng(0))
    assert resampled.shape == (500,) and (resampled == 1).all()
    for rater, prompt in ((np.zeros(3, int), np.arange(3)), (np.arange(3), np.full(3, 4))):
        assert resample_net(ones, rater, prompt, resamples=100, rng=np.random.default_rng(0)) is None


def test_equivalence_is_the_interval_inside_the_margin():
    resampled = np.random.default_rng(0).normal(0.03, 0.05, size=20_000)
    low, high = percentile_interval(resampled, confidence=0.90)
    for margin in (0.02, 0.05, 0.1, 0.112, 0.113, 0.13, 0.3):
        inside = -margin < low and high < margin
        assert (equivalence_p_value(resampled, margin) < 0.05) == inside
    assert equivalence_p_value(resampled, 0.02) > 0.5 and equivalence_p_value(resampled, 0.9) < 1e-4


def test_a_wider_margin_is_needed_the_fewer_the_votes():
    many = summarise_votes(make_votes({"all": (200, 400, 200)}, raters=40, prompts=20), **TOTALS)
    few = summarise_votes(make_votes({"all": (5, 10, 5)}, raters=4, prompts=5), **TOTALS)
    assert many.equivalence.shown and not few.equivalence.shown
    assert "Equivalent within the margin of ±15 points" in str(many)
    assert "Not shown to be equivalent" in str(few) and "the bootstrap is rough" in str(few)
    without = summarise_votes(make_votes({"all": (5, 10, 5)}), **{**TOTALS, "margin": None})
    assert without.equivalence is None and "no margin was set before the first vote" in str(without)


def test_a_preference_is_found_and_named():
    report = summarise_votes(make_votes({"scene": (10, 40, 50), "color": (30, 20, 28)}), **TOTALS)
    assert [row.dimension for row in report.rows] == ["color", "scene", "Total"]
    scene = report.rows[1]
    assert scene.net_interval[1] < 0 and scene.p_holm == pytest.approx(2 * scene.preference.p_value)
    assert "The methods differ" in str(report) and not report.equivalence.shown
    assert report.total.preference.votes == 178 == report.left + report.right + 60


def test_a_vote_in_two_dimensions_counts_once_in_total():
    votes = make_votes({"scene": (3, 3, 3)})
    both = [Vote(**{**vars(vote), "dimensions": ("color", "scene")}) for vote in votes]
    assert [row.preference.votes for row in summarise_votes(both, **TOTALS).rows] == [9, 9, 9]


def test_one_rater_says_nothing_about_others():
    report = summarise_votes(make_votes({"scene": (6, 3, 1)}, raters=1), **TOTALS)
    assert report.total.net_interval is None and report.equivalence is None
    assert "at least 2 of each are needed" in str(report)


def test_all_ties():
    report = str(summarise_votes(make_votes({"scene": (0, 22, 0)}), **TOTALS))
    assert "Every vote is a tie." in report and "| **0 / 22 / 0** |" in report


@pytest.fixture
def store(tmp_path):
    config = StudyConfig(ours=tmp_path / "a|b", baseline=tmp_path / "teacher", margin=0.2)
    pairs = [
        Pair(
            name=f"p{index}.mp4",
            prompt=f"p{index}",
            caption=None,
            dimensions=("color" if index % 2 else "scene",),
            ours_digest="o",
            baseline_digest="b",
        )
        for index in range(8)
    ]
    return StudyStore.create(tmp_path / "v.sqlite", config.fixed_settings(), pairs)


def vote_for(store: StudyStore, wanted: str) -> None:
    for rater in ("anna", "ben", "cleo"):
        state = store.enter(rater)
        while state.question:
            left = store.find_video(state.question.left)
            state = store.vote(state.question.token, "left" if left[0] == wanted else "right")


def test_report_files(store, tmp_path):
    vote_for(store, "ours")
    config = StudyReportConfig(database=store.path, output_dir=tmp_path / "out", resamples=200)
    report = study_report(config)
    assert report.total.preference.wins == 24 and report.total.preference.win_share == 1
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"study.md", "study.csv", "study.png", "votes.csv"}
    text = files["study.md"].read_text()
    assert text == f"{report}\n" and "a\\|b" in text
    assert all(line.replace("\\|", "").count("|") in (0, 6, 10) for line in text.splitlines())
    with open(files["study.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dimension"], row["votes"], row["wins"]) for row in rows] == [
        ("color", "12", "12"),
        ("scene", "12", "12"),
        ("Total", "24", "24"),
    ]
    assert (
        rows[2]["ours"] == "a|b"
        and float(rows[2]["net"]) == 1
        and float(rows[2]["p_value"]) == pytest.approx(2 / 2**24)
    )
    with open(files["votes.csv"], newline="") as file:
        votes = list(csv.DictReader(file))
    assert len(votes) == 24 and {vote["outcome"] for vote in votes} == {"ours"}
    with Image.open(files["study.png"]) as image:
        assert image.width > 1200 and len(set(image.convert("RGB").resize((200, 60)).getdata())) > 20
    first = {name: path.read_bytes() for name, path in files.items()}
    study_report(config)
    assert {name: path.read_bytes() for name, path in files.items()} == first


def test_labels_of_the_report_replace_the_studys(store, tmp_path):
    vote_for(store, "baseline")
    labels = tmp_path / "l.csv"
    labels.write_text("name,dimension\n" + "".join(f"p{index},motion\n" for index in range(8)))
    config = StudyReportConfig(database=store.path, output_dir=tmp_path / "out", labels=labels, resamples=100)
    assert [row.dimension for row in study_report(config).rows] == ["motion", "Total"]
    labels.write_text("name,dimension\np0,motion\n")
    with pytest.raises(StudyError, match=r"no dimension for 'p1\.mp4'"):
        study_report(StudyReportConfig(database=store.path, output_dir=tmp_path / "other", labels=labels))
    assert not (tmp_path / "other").exists()


def test_no_votes_yet(store, tmp_path):
    store.enter("anna")
    with pytest.raises(StudyError, match="no votes yet"):
        study_report(StudyReportConfig(database=store.path, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"confidence": 0.4}, "confidence is 0.4"), ({"confidence": 1.0}, "not, 1"), ({"resamples": 10}, "at least 100")],
)
def test_report_options_out_of_range(options, message):
    with pytest.raises(StudyError, match=message):
        StudyReportConfig(**options)
