"""Reading a teacher's self-attention while it runs: q, k, v after RoPE and the output y, block by block."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor

from ..ops.eager import softmax_attention
from .projections import project_qkv

Sink = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Called with (block, q, k, v, y), each tensor b n h d; y before the output projection."""


class CaptureAttnProcessor(WanAttnProcessor):
    """The stock self-attention, up to rounding; it also hands what goes in and comes out to a sink."""

    def __init__(self, block: int, sink: Sink) -> None:
        super().__init__()
        self.block, self.sink = block, sink

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v, _ = project_qkv(attn, hidden_states, rotary_emb)
        y = softmax_attention(q, k, v, self._attention_backend)
        self.sink(self.block, q, k, v, y)
        out = attn.to_out[0](y.flatten(2, 3).type_as(q))
        return attn.to_out[1](out)


def self_attention(model: WanTransformer3DModel, block: int) -> Any:
    """The self-attention layer of block `block`: a `WanAttention`, whose processor diffusers types too narrowly."""
    return cast(WanTransformerBlock, model.blocks[block]).attn1


@contextmanager
def capture(model: WanTransformer3DModel, blocks: Iterable[int], sink: Sink) -> Iterator[None]:
    """Within the context the self-attention of each of `blocks` reports to `sink`; results change by rounding alone."""
    layers = {block: self_attention(model, block) for block in blocks}
    before = {block: layer.processor for block, layer in layers.items()}
    try:
        for block, layer in layers.items():
            processor = CaptureAttnProcessor(block, sink)
            processor._attention_backend = before[block]._attention_backend
            layer.set_processor(processor)
        yield
    finally:
        for block, layer in layers.items():
            layer.set_processor(before[block])
