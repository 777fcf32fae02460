"""Light fine-tuning of a converted model (§3.3) on videos with captions."""

from .config import FinetuneConfig
from .dataset import read_dataset
from .loop import finetune

__all__ = ["FinetuneConfig", "finetune", "read_dataset"]
