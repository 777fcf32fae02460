"""Which models can be converted, and the conversion."""

from .conversion import convert_, revert_
from .hybrid_config import HybridConfig
from .hybrid_wan import HybridWanTransformer3DModel
from .install import disabled, hybrid_processors

__all__ = ["HybridConfig", "HybridWanTransformer3DModel", "convert_", "disabled", "hybrid_processors", "revert_"]
