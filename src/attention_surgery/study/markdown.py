"""A study's report as text, in the form of Table 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .statistics import Interval, wilson_interval

if TYPE_CHECKING:
    from .summary import StudyReport


def format_markdown(report: StudyReport) -> str:
    ours, baseline = _escape(report.ours_name), _escape(report.baseline_name)
    level = f"{report.confidence:.0%}"
    total = report.total
    lines = [
        "# Preference study",
        "",
        f"{total.preference.votes} votes by {total.raters} raters on {total.prompts} prompts, "
        "the two methods' names, order and sides hidden.",
        "",
        f"| Prompt dimension | {ours} % | No preference % | {baseline} % | Votes |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report.rows:
        shares = (row.preference.win_share, row.preference.tie_share, row.preference.loss_share)
        cells = [_escape(row.dimension), *(f"{100 * share:.1f}" for share in shares), str(row.preference.votes)]
        lines.append(f"| {' | '.join(_strong(cells, row is total))} |")
    lines += [
        "",
        f"Intervals ({level}): Wilson's for the shares; for the net preference ({ours} minus {baseline}, in points) "
        "the bootstrap over raters and prompts. p: exact binomial test of the win rate without ties; "
        "Holm: the same, adjusted for the number of dimensions.",
        "",
        f"| Prompt dimension | Win / tie / loss | {ours} | No preference | {baseline} | Win rate without ties "
        "| p | Holm | Net preference |",
        "|---|---:|---|---|---|---|---:|---:|---|",
    ]
    for row in report.rows:
        found = row.preference
        cells = [
            _escape(row.dimension),
            f"{found.wins} / {found.ties} / {found.losses}",
            _percent(found.win_share, found.win_interval),
            _percent(found.tie_share, found.tie_interval),
            _percent(found.loss_share, found.loss_interval),
            _percent(found.win_rate, found.win_rate_interval),
            _p(found.p_value),
            _p(row.p_holm),
            _points(found.net, row.net_interval),
        ]
        lines.append(f"| {' | '.join(_strong(cells, row is total))} |")
    return "\n".join([*lines, "", "## What it shows", "", *(f"- {finding}" for finding in _findings(report))])


def _findings(report: StudyReport) -> list[str]:
    total, found = report.total, report.total.preference
    findings = []
    if found.p_value is None or found.win_rate is None or found.win_rate_interval is None:
        findings.append("Every vote is a tie.")
    else:
        alpha = 1 - report.confidence
        verdict = (
            "No difference detected, which is not yet equality" if found.p_value >= alpha else "The methods differ"
        )
        findings.append(
            f"{verdict}: without ties, {_escape(report.ours_name)} wins "
            f"{_percent(found.win_rate, found.win_rate_interval)} % (exact p = {_p(found.p_value)}, "
            "taking every vote as independent)."
        )
    if total.net_interval is None:
        findings.append(
            f"The votes are of {total.raters} rater(s) on {total.prompts} prompt(s); at least 2 of each are needed to "
            "say anything about other raters and prompts, so there is no bootstrap interval and no test of equivalence."
        )
    elif min(total.raters, total.prompts) < 10:
        findings.append(
            f"With {total.raters} raters and {total.prompts} prompts the bootstrap is rough; have 10 of each."
        )
    if report.margin is None:
        findings.append("Equivalence was not tested: no margin was set before the first vote.")
    elif report.equivalence is not None:
        test = report.equivalence
        low, high = (100 * bound for bound in test.interval)
        findings.append(
            f"{'Equivalent' if test.shown else 'Not shown to be equivalent'} within the margin of "
            f"±{100 * test.margin:g} points set before the first vote: two one-sided tests, p = {_p(test.p_value)}; "
            f"{2 * report.confidence - 1:.0%} interval of the net preference [{low:+.1f}, {high:+.1f}]."
        )
    if decided := report.left + report.right:
        low, high = wilson_interval(report.left, decided, confidence=report.confidence)
        findings.append(
            f"Video A, on the left, won {_percent(report.left / decided, (low, high))} % of the votes without ties; "
            "sides were balanced for every rater, so a habit of side favours neither method."
        )
    return findings


def _escape(name: str) -> str:
    return name.replace("|", "\\|")


def _strong(cells: list[str], strong: bool) -> list[str]:
    return [f"**{cell}**" for cell in cells] if strong else cells


def _percent(share: float | None, interval: Interval | None) -> str:
    if share is None or interval is None:
        return "–"
    return f"{100 * share:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _points(net: float, interval: Interval | None) -> str:
    bounds = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return f"{100 * net:+.1f}{bounds}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 else "< 0.001"
