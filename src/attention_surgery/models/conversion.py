"""`convert_` and `revert_`: a stock Wan transformer to a hybrid one and back, in place."""

from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import FrozenDict

from ..errors import ModelError
from .hybrid_config import HybridConfig
from .hybrid_wan import HybridWanTransformer3DModel
from .install import install_, uninstall_


def convert_(model: WanTransformer3DModel, config: HybridConfig) -> None:
    """Make the self-attention of the blocks in `config.rates` hybrid, in place, with freshly drawn φ.

    Every base key and every block class stays as it was; cross-attention is not touched. The model becomes a
    `HybridWanTransformer3DModel`, whose config says so. Everything is checked before anything is changed.

    Args:
        model: a `WanTransformer3DModel` (T2V, I2V or TI2V, any size), on any device, in any floating dtype.
        config: rates and feature map.

    Raises:
        ModelError: another class of model (a compiled wrapper, VACE, Animate), or one that is converted already.
        RateError: a block that does not exist.
    """
    if isinstance(model, HybridWanTransformer3DModel):
        raise ModelError(f"this model is converted already ({model.hybrid_config}); revert_ it first")
    if type(model) is not WanTransformer3DModel:
        raise ModelError(f"cannot convert a {type(model).__name__}; expected diffusers' WanTransformer3DModel")
    if model._parallel_config is not None:
        raise ModelError("cannot convert a model under context or tensor parallelism; convert before enabling it")
    install_(model, config)
    model.__class__ = HybridWanTransformer3DModel
    model.register_to_config(hybrid=config.to_dict())


def revert_(model: WanTransformer3DModel) -> None:
    """Undo `convert_`: stock processors, stock class, stock config. φ is dropped; other weights stay as they are.

    Raises:
        ModelError: a model that is not converted.
    """
    if not isinstance(model, HybridWanTransformer3DModel):
        raise ModelError(f"cannot revert a {type(model).__name__}: it is not converted")
    uninstall_(model)
    model.__class__ = WanTransformer3DModel  # type: ignore[assignment]
    model._internal_dict = FrozenDict({name: value for name, value in model.config.items() if name != "hybrid"})
