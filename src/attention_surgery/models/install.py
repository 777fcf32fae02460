"""Putting hybrid processors into a Wan transformer's self-attention, and taking them out again."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from ..errors import ModelError, RateError
from ..layers.capture import self_attention
from ..layers.processor import GridRecorder, HybridAttnProcessor
from .hybrid_config import HybridConfig


def hybrid_processors(model: WanTransformer3DModel) -> dict[int, HybridAttnProcessor]:
    """Block index → processor of its hybrid self-attention, for the blocks that have one."""
    return {
        index: processor
        for index in range(len(model.blocks))
        if isinstance(processor := self_attention(model, index).processor, HybridAttnProcessor)
    }


def check_blocks(model: WanTransformer3DModel, config: HybridConfig) -> None:
    """RateError if `config` names a block that `model` lacks; ModelError if a layer is not stock self-attention."""
    count = len(model.blocks)
    for index in config.rates:
        if index >= count:
            raise RateError(f"block {index} does not exist; this model has {count} blocks (0-{count - 1})")
        attn = self_attention(model, index)
        if not isinstance(attn, WanAttention) or attn.is_cross_attention:
            raise ModelError(f"blocks.{index}.attn1 is {type(attn).__name__}; expected WanAttention, self-attention")
        if type(attn.processor) is not WanAttnProcessor:
            raise ModelError(
                f"blocks.{index}.attn1 has processor {type(attn.processor).__name__}; expected the stock "
                "WanAttnProcessor: reset it before converting"
            )


def install_(model: WanTransformer3DModel, config: HybridConfig) -> None:
    """Give each block named in `config` a hybrid processor with fresh φ, of the layer's dtype and device."""
    check_blocks(model, config)
    processors = []
    for index, rate in config.rates.items():
        attn = self_attention(model, index)
        weight = attn.norm_q.weight
        processor = HybridAttnProcessor(
            attn.heads,
            attn.inner_dim // attn.heads,
            rate=rate,
            degree=config.degree,
            layers=config.layers,
            normalizer=config.normalizer,
            pattern=config.pattern,
        ).to(device=weight.device, dtype=weight.dtype)
        processor._attention_backend = attn.processor._attention_backend
        processor.train(attn.training)
        attn.set_processor(processor)
        processors.append(processor)
    if config.pattern == "lattice":
        model.rope.register_forward_pre_hook(GridRecorder(processors, tuple(model.config["patch_size"])))


def uninstall_(model: WanTransformer3DModel) -> None:
    """Put the stock processor back into every hybrid layer; φ is dropped."""
    for index, processor in hybrid_processors(model).items():
        stock = WanAttnProcessor()
        stock._attention_backend = processor._attention_backend
        self_attention(model, index).set_processor(stock)
    hooks = model.rope._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, GridRecorder)]:
        del hooks[key]


@contextmanager
def disabled(model: WanTransformer3DModel) -> Iterator[None]:
    """Within the context every hybrid layer of `model` is the softmax layer that it was, on the current weights.

    Up to rounding: norms and RoPE stay a kernel's, where they are.
    """
    processors = list(hybrid_processors(model).values())
    if not processors:
        raise ModelError(f"{type(model).__name__} has no hybrid layer to disable; convert_ it first")
    before = [processor.enabled for processor in processors]
    for processor in processors:
        processor.enabled = False
    try:
        yield
    finally:
        for processor, enabled in zip(processors, before, strict=True):
            processor.enabled = enabled
