"""The recipe: all stages in one resumable run."""

from .config import RecipeConfig, read_config
from .run import run

__all__ = ["RecipeConfig", "read_config", "run"]
