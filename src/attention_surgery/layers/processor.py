"""The attention processor of a converted self-attention layer: stock projections, hybrid attention."""

from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from ..errors import ModelError
from ..ops.hybrid import Backend, hybrid_attention
from ..ops.tokens import Grid
from ..rates import Normalizer, Pattern, Rate
from .feature_map import FeatureMap
from .projections import RotaryEmb, project_qkv


class HybridAttnProcessor(nn.Module):
    """Takes the place of diffusers' `WanAttnProcessor` in `attn1`; owns φ_q and φ_k, so its keys are the whole delta.

    Projections, QK-norm, RoPE and output projection are the attention layer's own, in the stock order; where a kernel
    can stand for norms and RoPE it does (`project_qkv`). q and k enter the operator after RoPE. With `enabled = False`
    the layer is the softmax layer that it was, up to rounding.

    Context parallelism splits the tokens over devices, which the strided softmax set and the linear state do not
    support: setting `_parallel_config` makes the next forward raise ModelError.
    """

    _attention_backend = None  # set by `set_attention_backend` of diffusers: used for the softmax part
    _parallel_config = None  # set by `enable_parallelism` of diffusers

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        rate: Rate,
        degree: int = 2,
        layers: int = 2,
        normalizer: Normalizer = "mean",
        pattern: Pattern = "stride",
    ) -> None:
        super().__init__()
        self.rate: Rate = rate
        self.normalizer: Normalizer = normalizer
        self.pattern: Pattern = pattern
        self.phi_q = FeatureMap(heads, head_dim, degree=degree, layers=layers)
        self.phi_k = FeatureMap(heads, head_dim, degree=degree, layers=layers)
        self.enabled = True
        self.backend: Backend = "auto"
        self.grid: Grid | None = None  # written by GridRecorder before each forward, for pattern "lattice"

    def forward(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: RotaryEmb | None = None,
    ) -> Tensor:
        """Self-attention on `hidden_states` (b n h·d) of the layer `attn`; returns b n h·d."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ModelError("hybrid attention replaces unmasked self-attention; it got a mask or a context")
        if self._parallel_config is not None:
            raise ModelError(
                "hybrid attention does not run under context parallelism; call revert_(model) or use one device"
            )
        q, k, v, key_source = project_qkv(attn, hidden_states, rotary_emb, self.backend)
        out = hybrid_attention(
            q,
            k,
            v,
            self.phi_q,
            self.phi_k,
            rate=self.rate if self.enabled else 1,
            normalizer=self.normalizer,
            pattern=self.pattern if self.enabled else "stride",
            grid=self.grid,
            backend=self.backend,
            attention_backend=self._attention_backend,
            projection=attn.to_out[0],
            key_source=key_source,
        )
        return attn.to_out[1](out)

    def extra_repr(self) -> str:
        return f"rate={self.rate!r}, normalizer={self.normalizer!r}, pattern={self.pattern!r}"


class GridRecorder:
    """A forward pre-hook of `model.rope`, which is given the latents: tells the processors the token grid."""

    def __init__(self, processors: list[HybridAttnProcessor], patch_size: tuple[int, int, int]) -> None:
        self.processors, self.patch_size = processors, patch_size

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        frames, rows, columns = (size // patch for size, patch in zip(args[0].shape[2:], self.patch_size, strict=True))
        for processor in self.processors:
            processor.grid = (frames, rows, columns)
