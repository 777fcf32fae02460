"""The learned polynomial feature map φ of linear attention (§3.2, Table 6)."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, TensorError

SQUAREPLUS_WIDTH = 0.25
SILU_SECOND_MOMENT = 0.3558  # E[silu(x)^2] for x ~ N(0, 1)


def squareplus(x: Tensor) -> Tensor:
    """(x + sqrt(x² + b)) / 2 with b = 0.25: a smooth ReLU that is positive, with a gradient that decays as 1/x² only.

    Evaluated as relu(x) + b / 2(sqrt(x² + b) + |x|), which is the same and never cancels.
    """
    tail = (torch.sqrt(x * x + SQUAREPLUS_WIDTH) + x.abs()).reciprocal()
    return torch.add(F.relu(x), tail, alpha=0.5 * SQUAREPLUS_WIDTH)


class FeatureMap(nn.Module):
    """φ(x) = (P·D)^(-1/2) · [ψ_1(x), ψ_2(x)², …, ψ_P(x)^P], non-negative, one map per head.

    ψ is an embedding network of `layers` grouped 1×1 convolutions (groups = heads), D → P·D → … → P·D with biases,
    SiLU between them and squareplus at the end, so that every feature is positive. Its output is split in P slices of
    D' = D. Weights are drawn so that for inputs of unit variance the mean of φ_q(q)·φ_k(k) is about 1, which is the
    natural scale of exp(logit) relative to the average softmax token (normalizer "mean").

    Table 6 counts one map at 12 heads of 128: 1.19 M parameters for P = 2, L = 2.

    Args:
        heads: number of attention heads h.
        head_dim: channels per head d.
        degree: P, the highest power.
        layers: L, the number of convolutions.

    Raises:
        ConfigError: an argument below 1.
    """

    def __init__(self, heads: int, head_dim: int, *, degree: int = 2, layers: int = 2) -> None:
        super().__init__()
        for name, value in {"heads": heads, "head_dim": head_dim, "degree": degree, "layers": layers}.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"FeatureMap needs {name} >= 1, an integer; got {value!r}")
        self.heads, self.head_dim, self.degree, self.layers = heads, head_dim, degree, layers
        self.features = degree * head_dim
        widths = [head_dim] + [self.features] * layers
        pairs = list(itertools.pairwise(widths))
        # Parameters of this module, not of a ParameterList: offloading brings them back when their module is called.
        for layer, (i, o) in enumerate(pairs):
            self.register_parameter(f"weight_{layer}", nn.Parameter(torch.empty(heads, i, o)))
            self.register_parameter(f"bias_{layer}", nn.Parameter(torch.empty(heads, o)))
        self.reset_parameters()

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The weight of each layer, h in out."""
        return tuple(getattr(self, f"weight_{layer}") for layer in range(self.layers))

    @property
    def biases(self) -> tuple[nn.Parameter, ...]:
        """The bias of each layer, h out."""
        return tuple(getattr(self, f"bias_{layer}") for layer in range(self.layers))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, at the natural scale (see the class)."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            second_moment = SILU_SECOND_MOMENT if layer else 1.0
            weight.normal_(0.0, 1.0 / math.sqrt(weight.shape[1] * second_moment))
            bias.zero_()
        for power, columns in enumerate(self.weights[-1].split(self.head_dim, dim=-1), start=1):
            # E[relu(x)^p] for x ~ N(0, s²) is s^p 2^(p/2 - 1) Γ((p+1)/2) / √π: the s that makes it 1.
            moment = 2 ** (power / 2 - 1) * math.gamma((power + 1) / 2) / math.sqrt(math.pi)
            columns.mul_(moment ** (-1 / power))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (b n h d) to features (b n h P·d), in the dtype of `x`. TensorError for another shape or device."""
        if x.ndim != 4 or x.shape[2:] != (self.heads, self.head_dim):
            raise TensorError(f"feature map of {self.heads} heads of {self.head_dim} got shape {tuple(x.shape)}")
        if x.device != self.weights[0].device:
            raise TensorError(f"feature map on {self.weights[0].device} got an input on {x.device}; move one of them")
        b, n, _, _ = x.shape
        y = x.permute(2, 0, 1, 3).flatten(1, 2)  # h (b n) d: one batched product per layer, no copy for one sample
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias.to(x.dtype)[:, None], y, weight.to(x.dtype))
            y = F.silu(y) if layer < self.layers - 1 else squareplus(y)
        powers = [part**power * self.features**-0.5 for power, part in enumerate(y.split(self.head_dim, -1), start=1)]
        return torch.cat(powers, dim=-1).unflatten(1, (b, n)).permute(1, 2, 0, 3).to(x.dtype)  # autocast may narrow it

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, degree={self.degree}, layers={self.layers}"
