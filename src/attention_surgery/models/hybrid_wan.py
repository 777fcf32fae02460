"""The class of a converted Wan transformer: the stock one plus `hybrid` in its config, loaded strictly."""

import inspect
from os import PathLike
from typing import Any

from diffusers import (
    ModelMixin,  # noqa: F401 - diffusers asks the module of a saved pipeline's component for its base class
    WanTransformer3DModel,
)

from ..errors import CheckpointError, ModelError
from .hybrid_config import HybridConfig
from .install import install_

NO_PARALLELISM = (
    "a hybrid model does not run under context or tensor parallelism; use data parallelism or FSDP, or revert_ it first"
)


class HybridWanTransformer3DModel(WanTransformer3DModel):
    """A `WanTransformer3DModel` some of whose self-attention layers are hybrid.

    `convert_` turns a stock model into one in place; `from_pretrained` reads one back. Blocks, their classes and every
    base key are the stock ones. Its config names this class and carries the hybrid configuration, and its weights are
    diffusers' variant "hybrid": the stock class, which would drop φ with no more than a warning and run softmax
    attention, finds no weights in a hybrid checkpoint and fails.

    Args:
        hybrid: a `HybridConfig` as a JSON object.
        base: arguments of `WanTransformer3DModel`.
    """

    def __init__(self, hybrid: dict[str, Any], **base: Any) -> None:
        config = HybridConfig.from_dict(hybrid)
        super().__init__(**base)
        install_(self, config)
        self.register_to_config(hybrid=config.to_dict())

    @property
    def hybrid_config(self) -> HybridConfig:
        """The rates and settings that this model was converted with."""
        return HybridConfig.from_dict(self.config["hybrid"])

    def enable_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """ModelError: the softmax set and the linear state span all tokens, which context parallelism splits."""
        raise ModelError(NO_PARALLELISM)

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:  # type: ignore[override]
        """As in diffusers, as variant "hybrid"."""
        kwargs["variant"] = _variant(kwargs.get("variant"))
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike | None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in diffusers, but CheckpointError if any key is missing, unexpected or of another shape.

        ModelError for a `parallel_config`, as in `enable_parallelism`.
        """
        if kwargs.get("parallel_config") is not None:
            raise ModelError(NO_PARALLELISM)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["variant"] = _variant(kwargs.get("variant"))
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)  # type: ignore[misc]
        faults = [
            f"{len(info[what])} {what.replace('_', ' ')}, the first {sorted(map(str, info[what]))[0]}"
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[what]
        ]
        if faults:
            raise CheckpointError(f"{pretrained_model_name_or_path} does not fit its own config: {'; '.join(faults)}")
        return (model, info) if wants_info else model


def _variant(variant: str | None) -> str:
    return "hybrid" if variant is None else f"hybrid-{variant.removeprefix('hybrid-')}"


def _signature() -> inspect.Signature:
    base = inspect.signature(WanTransformer3DModel.__init__)
    own = inspect.Parameter("hybrid", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(base.parameters.values())
    return base.replace(parameters=[parameters[0], own, *parameters[1:]])


# diffusers reads the accepted config keys off the signature.
HybridWanTransformer3DModel.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
