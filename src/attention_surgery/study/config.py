"""The settings of a study and of its report."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import StudyError


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study of two folders of videos with the same file names.

    All but the folders, `database`, `host` and `port` is kept in the database when it is made, and cannot change after:
    a margin chosen once the votes are known would prove nothing.

    Args:
        ours: folder of videos.
        baseline: folder of videos with the same names; every file of one has its namesake in the other.
        database: SQLite file of the votes; made when it does not exist, resumed when it does.
        ours_name: what the report calls ours; None: the folder's name. Raters never see it.
        baseline_name: what the report calls the baseline, likewise.
        labels: CSV or JSON with the `dimension` and the `prompt` of each name; see `read_labels`. Prompts are shown.
        seeds: None: every file is a prompt of its own. Otherwise files are named `{prompt}-{seed}.mp4`, as VBench
            names them, and these seeds of every prompt are shown.
        pairs_per_rater: None: every rater is asked about every pair. Otherwise about this many, those that the fewest
            raters were given so far.
        margin: largest difference, as the share of votes for ours minus the share for the baseline, that still counts
            as "no difference"; the report then tests for equivalence. None: it does not.
        title: heading of the page.
        question: what the page asks; None: one that fits, with or without prompts.
        watch_fully: whether the answers unlock only when a pair was played to its end once.
        seed: of the order and the sides; each rater's are drawn from this and the rater's id.
        host: address to listen on. The default can be reached from this machine only.
        port: TCP port; 0: a free one.
    """

    ours: Path
    baseline: Path
    database: Path = Path("study.sqlite")
    ours_name: str | None = None
    baseline_name: str | None = None
    labels: Path | None = None
    seeds: tuple[int, ...] | None = None
    pairs_per_rater: int | None = None
    margin: float | None = None
    title: str = "Video comparison"
    question: str | None = None
    watch_fully: bool = True
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 7860

    def __post_init__(self) -> None:
        if self.seeds is not None:
            if not self.seeds:
                raise StudyError("seeds is empty; name at least one, or leave it out")
            if repeats := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
                raise StudyError(
                    f"seeds has repeats: {repeats}; a pair shown twice would be counted twice, name each once"
                )
            if min(self.seeds) < 0:
                raise StudyError(f"seeds are {self.seeds}; expected none below 0")
        if self.pairs_per_rater is not None and self.pairs_per_rater < 1:
            raise StudyError(f"pairs_per_rater is {self.pairs_per_rater}; expected at least 1")
        if self.margin is not None and not 0 < self.margin < 1:
            raise StudyError(f"margin is {self.margin}; expected a share of the votes between 0 and 1, such as 0.1")
        if not 0 <= self.port <= 65535:
            raise StudyError(f"port is {self.port}; expected 0 to 65535")
        if not self.title.strip():
            raise StudyError("title is empty; it is the page's heading")
        ours, baseline = self.method_names()
        if not ours or not baseline or ours == baseline:
            raise StudyError(
                f"the two methods are called {ours!r} and {baseline!r}; give them different names by ours_name and "
                "baseline_name"
            )
        for field in ("title", "question"):
            for name in (ours, baseline):
                if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", getattr(self, field) or "", re.IGNORECASE):
                    raise StudyError(
                        f"{field} names the method {name!r}, which raters must not see; reword it, or call the method "
                        "something else by ours_name or baseline_name"
                    )

    def method_names(self) -> tuple[str, str]:
        """What the report calls ours and the baseline."""
        ours = self.ours.resolve().name if self.ours_name is None else self.ours_name.strip()
        return ours, self.baseline.resolve().name if self.baseline_name is None else self.baseline_name.strip()

    def fixed_settings(self) -> dict[str, Any]:
        """What the database keeps, as JSON values."""
        settings = asdict(self)
        for name in ("ours", "baseline", "database", "labels", "host", "port"):
            del settings[name]
        settings["ours_name"], settings["baseline_name"] = self.method_names()
        return json.loads(json.dumps(settings))


@dataclass(frozen=True, kw_only=True)
class StudyReportConfig:
    """What `study_report` makes of the votes.

    Args:
        database: SQLite file that `serve` made.
        output_dir: folder of the report's files; made when missing.
        labels: CSV or JSON with a `dimension` per name, in place of what the study was made with.
        confidence: of the intervals. Equivalence is tested at the level 1 - confidence.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    database: Path = Path("study.sqlite")
    output_dir: Path = Path("study-report")
    labels: Path | None = None
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise StudyError(f"confidence is {self.confidence}; expected 0.5 up to, but not, 1, such as 0.95")
        if self.resamples < 100:
            raise StudyError(f"resamples is {self.resamples}; expected at least 100")
