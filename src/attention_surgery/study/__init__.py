"""A blind preference study that people can take, and what its votes say (§4, Table 2)."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import StudyConfig as StudyConfig
    from .config import StudyReportConfig as StudyReportConfig
    from .report import study_report as study_report
    from .server import serve as serve
    from .summary import StudyReport as StudyReport
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        config=["StudyConfig", "StudyReportConfig"],
        report=["study_report"],
        server=["serve"],
        summary=["StudyReport"],
    )
