"""The paper's experiments and some more, on the embedded tiny-wan: one command each, resumable."""

from .plans import EXPERIMENTS
from .run import run_experiments

__all__ = ["EXPERIMENTS", "run_experiments"]
