"""Reading a study's votes and writing what they say."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace

from ..errors import StudyError
from ..files import write_atomic, write_text
from .config import StudyReportConfig
from .figure import draw_preferences
from .store import StudyStore, Vote
from .summary import StudyReport, summarise_votes
from .videos import read_labels


def study_report(config: StudyReportConfig) -> StudyReport:
    """Read a study's votes and write its report.

    Into `output_dir` go `study.md`, `study.csv` (one line per dimension and the total), `study.png`, and `votes.csv`
    (every vote, unblinded, for other analyses).

    Raises:
        StudyError: no study's file, no votes yet, or labels that leave a video out. Nothing is written then.
    """
    store = StudyStore(config.database)
    votes = store.votes()
    if not votes:
        raise StudyError(f"{config.database} holds no votes yet; the report needs at least one")
    if config.labels is not None:
        labels = read_labels(config.labels, {pair.name: pair.prompt for pair in store.pairs})
        votes = [replace(vote, dimensions=labels[vote.name].dimensions) for vote in votes]
    report = summarise_votes(
        votes,
        ours_name=store.settings["ours_name"],
        baseline_name=store.settings["baseline_name"],
        margin=store.settings["margin"],
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
    )
    write_text(config.output_dir / "study.md", f"{report}\n")
    write_text(config.output_dir / "study.csv", _csv(_table(report)))
    write_text(config.output_dir / "votes.csv", _csv(_vote_lines(votes)))
    with write_atomic(config.output_dir / "study.png") as temporary:
        draw_preferences(report).savefig(temporary, dpi=160)
    return report


def _table(report: StudyReport) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for row in report.rows:
        found = row.preference
        line: dict[str, object] = {
            "dimension": row.dimension,
            "ours": report.ours_name,
            "baseline": report.baseline_name,
            "raters": row.raters,
            "prompts": row.prompts,
            "votes": found.votes,
            "wins": found.wins,
            "ties": found.ties,
            "losses": found.losses,
        }
        for name, value, interval in (
            ("win_share", found.win_share, found.win_interval),
            ("tie_share", found.tie_share, found.tie_interval),
            ("loss_share", found.loss_share, found.loss_interval),
            ("win_rate", found.win_rate, found.win_rate_interval),
            ("net", found.net, row.net_interval),
        ):
            line |= {name: value, f"{name}_low": interval and interval[0], f"{name}_high": interval and interval[1]}
        test = report.equivalence if row is report.total else None
        line |= {"p_value": found.p_value, "p_holm": row.p_holm, "confidence": report.confidence}
        line |= {"margin": report.margin, "equivalence_p_value": test and test.p_value}
        lines.append(line)
    return lines


def _vote_lines(votes: Sequence[Vote]) -> list[dict[str, object]]:
    sides = {"left": "A", "right": "B", "none": "none"}
    return [
        {
            "rater": vote.rater,
            "name": vote.name,
            "prompt": vote.prompt,
            "dimensions": ";".join(vote.dimensions),
            "outcome": vote.outcome,
            "answer": sides[vote.side],
            "shown_at": vote.shown_at,
            "voted_at": vote.voted_at,
        }
        for vote in votes
    ]


def _csv(lines: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
