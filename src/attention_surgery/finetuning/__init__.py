"""Light fine-tuning of a converted model (§3.3) on videos with captions."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import FinetuneConfig as FinetuneConfig
    from .dataset import read_dataset as read_dataset
    from .loop import finetune as finetune
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        config=["FinetuneConfig"],
        dataset=["read_dataset"],
        loop=["finetune"],
    )
