"""A blind preference study that people can take, and what its votes say (§4, Table 2)."""

from .config import StudyConfig, StudyReportConfig
from .report import study_report
from .server import serve
from .summary import StudyReport

__all__ = ["StudyConfig", "StudyReport", "StudyReportConfig", "serve", "study_report"]
