"""Speed, measured: hybrid attention beside the fastest dense attention of the same device, in the same run."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import BenchmarkConfig as BenchmarkConfig
    from .publish import publish_results as publish_results
    from .running import check_rows as check_rows
    from .running import describe_plan as describe_plan
    from .running import run_benchmark as run_benchmark
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        config=["BenchmarkConfig"],
        publish=["publish_results"],
        running=["check_rows", "describe_plan", "run_benchmark"],
    )
