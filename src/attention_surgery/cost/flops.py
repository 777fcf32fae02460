"""FLOPs of one transformer block: the real block runs on meta tensors and its matrix products are counted."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..layers.processor import HybridAttnProcessor
from ..models.wan import WanSpec
from ..rates import Rate


@dataclass(frozen=True, kw_only=True)
class BlockFlops:
    """FLOPs of one block at one rate, for one forward of one sample; two per multiply-add of a matrix product.

    Biases, norms, activations and softmax exponentials are not counted, as in the paper's figures.

    Args:
        rate: of its self-attention.
        projections: Q, K, V and output projections of self-attention.
        core: what lies between them but φ: QKᵀ and PV; in a hybrid layer on the softmax tokens only, plus the linear
            tokens' state and its read-out.
        feature_maps: φ_q on all tokens and φ_k on the linear tokens; 0 for softmax.
        cross_attention: with its projections; not touched by a conversion.
        feed_forward: not touched either.
    """

    rate: Rate
    projections: int
    core: int
    feature_maps: int
    cross_attention: int
    feed_forward: int

    @property
    def attention(self) -> int:
        """All of self-attention: projections, core and φ."""
        return self.projections + self.core + self.feature_maps

    @property
    def total(self) -> int:
        """The whole block."""
        return self.attention + self.cross_attention + self.feed_forward


@cache
def block_flops(spec: WanSpec, rate: Rate, tokens: int, *, degree: int = 2, layers: int = 2) -> BlockFlops:
    """Count one block of `spec` at `rate` on `tokens` tokens, with φ of the given degree and depth.

    Every normalizer and token pattern has the same matrix products.
    """
    backend = "native"  # the other attention kernels refuse meta tensors, as do ours
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        block = build_block(spec, backend=backend)
        processor = build_processor(spec, rate, backend=backend, degree=degree, layers=layers)
    if rate != 1:
        processor.backend = "eager"
    block.attn1.set_processor(processor)
    with torch.no_grad(), counter:
        block(*block_inputs(spec, tokens, device=torch.device("meta"), dtype=torch.float32))
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    name = type(block).__name__
    projections = sum(counts[f"{name}.attn1.{part}"] for part in ("to_q", "to_k", "to_v", "to_out.0"))
    feature_maps = sum(counts.get(f"{name}.attn1.processor.{part}", 0) for part in ("phi_q", "phi_k"))
    flops = BlockFlops(
        rate=rate,
        projections=projections,
        core=counts[f"{name}.attn1"] - projections - feature_maps,
        feature_maps=feature_maps,
        cross_attention=counts[f"{name}.attn2"],
        feed_forward=counts[f"{name}.ffn"],
    )
    assert flops.total == counter.get_total_flops(), "a block has matrix products outside its three parts"
    return flops


def build_block(spec: WanSpec, *, backend: str | None) -> WanTransformerBlock:
    """A stock block with random weights on the default device; `backend` is the attention kernel of cross-attention."""
    block = WanTransformerBlock(
        spec.dim, spec.ffn_dim, spec.heads, spec.qk_norm, spec.cross_attn_norm, spec.eps, spec.added_kv_dim
    )
    processor: Any = block.attn2.processor
    processor._attention_backend = backend
    return block


def build_processor(spec: WanSpec, rate: Rate, *, backend: str | None, **options: Any) -> Any:
    """The self-attention processor of a block at `rate`, the stock one for rate 1, with attention kernel `backend`."""
    stock = rate == 1
    processor: Any = (
        WanAttnProcessor() if stock else HybridAttnProcessor(spec.heads, spec.head_dim, rate=rate, **options)
    )
    processor._attention_backend = backend
    return processor


def block_inputs(
    spec: WanSpec, tokens: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Random arguments of a block's forward for one sample: hidden states, context, time and rotary embeddings."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    context = spec.image_tokens + spec.text_tokens
    angles = torch.rand(1, tokens, 1, spec.head_dim // 2, device=device).repeat_interleave(2, dim=-1)
    return (
        torch.randn(1, tokens, spec.dim, **options),
        torch.randn(1, context, spec.dim, **options),
        torch.randn(1, 6, spec.dim, device=device),
        (angles.cos(), angles.sin()),
    )
