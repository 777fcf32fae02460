"""The figure of a study: shares of the three answers, and the net preference with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .summary import StudyReport

OURS, TIE, BASELINE, INK = "#1f6f8b", "#d9dcdf", "#c9713b", "#22272b"


def draw_preferences(report: StudyReport) -> Figure:
    """Stacked shares per dimension and in total (left), net preference with bootstrap interval and margin (right)."""
    rows = report.rows
    places = [-float(index) for index in range(len(rows))]
    if len(rows) > 1:
        places[-1] -= 0.4
    figure = Figure(figsize=(10, 1.9 + 0.42 * len(rows)), layout="constrained")
    shares, net = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for row, place in zip(rows, places, strict=True):
        found, left = row.preference, 0.0
        for share, colour, ink in (
            (found.win_share, OURS, "white"),
            (found.tie_share, TIE, INK),
            (found.loss_share, BASELINE, "white"),
        ):
            shares.barh(place, 100 * share, left=left, height=0.72, color=colour)
            if share >= 0.06:
                shares.text(left + 50 * share, place, f"{100 * share:.1f}", color=ink, ha="center", va="center", size=9)
            left += 100 * share
        net.plot(100 * found.net, place, "o", color=INK, markersize=5, zorder=3)
        if row.net_interval is not None:
            net.plot([100 * bound for bound in row.net_interval], [place, place], color=INK, linewidth=1.6)
    shares.set_yticks(places, [f"{row.dimension}  ({row.preference.votes})" for row in rows])
    shares.get_yticklabels()[-1].set_fontweight("bold")
    shares.set_xlim(0, 100)
    shares.set_ylim(places[-1] - 0.6, 0.6)
    shares.set_xlabel("share of votes, %\n(number of votes beside the name)")
    shares.legend(
        handles=[shares.barh(0, 0, color=colour) for colour in (OURS, TIE, BASELINE)],
        labels=[f"prefers {report.ours_name}", "no preference", f"prefers {report.baseline_name}"],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.2,
    )
    net.axvline(0, color=INK, linewidth=0.8)
    if report.margin is not None:
        net.axvspan(-100 * report.margin, 100 * report.margin, color=TIE, alpha=0.6, linewidth=0, zorder=0)
    reach = max(
        abs(bound) for row in rows for bound in (*(row.net_interval or ()), row.preference.net, report.margin or 0)
    )
    net.set_xlim(-105 * max(reach, 0.3), 105 * max(reach, 0.3))
    drawn = [f"{report.confidence:.0%} interval"] if report.total.net_interval is not None else []
    drawn += ["band: margin"] if report.margin is not None else []
    net.set_xlabel("\n".join(["net preference, points", "; ".join(drawn)]).strip())
    net.annotate(
        f"← {report.baseline_name}", (0, 1.02), xycoords="axes fraction", ha="left", va="bottom", color=BASELINE
    )
    net.annotate(f"{report.ours_name} →", (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", color=OURS)
    for axes in (shares, net):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure
