"""The recipe: all stages in one resumable run."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import RecipeConfig as RecipeConfig
    from .config import read_config as read_config
    from .sequence import run as run
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        config=["RecipeConfig", "read_config"],
        sequence=["run"],
    )
