"""Which models can be converted, and the conversion."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .conversion import convert_ as convert_
    from .conversion import revert_ as revert_
    from .hybrid_config import HybridConfig as HybridConfig
    from .hybrid_wan import HybridWanTransformer3DModel as HybridWanTransformer3DModel
    from .install import disabled as disabled
    from .install import hybrid_processors as hybrid_processors
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        conversion=["convert_", "revert_"],
        hybrid_config=["HybridConfig"],
        hybrid_wan=["HybridWanTransformer3DModel"],
        install=["disabled", "hybrid_processors"],
    )
