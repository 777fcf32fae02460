"""The paper's experiments and some more, on the embedded tiny-wan: one command each, resumable."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .plans import EXPERIMENTS as EXPERIMENTS
    from .run import run_experiments as run_experiments
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, plans=["EXPERIMENTS"], run=["run_experiments"])
