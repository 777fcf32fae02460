# pyright: reportArgumentType=false
"""What the launches of one call share: parameters in the right dtype, block sizes, constants, results to fill."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ...rates import Rate
from ..tokens import softmax_count
from .blocks import Blocks, Kernel, blocks_of
from .descriptors import matrix_blocks, token_blocks
from .prepare import prepare_kernel

INTERPRETED: bool = knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""

PROCESSORS = 2
"""That the interpreter seems to have: sums over the tokens then have a share or two."""


RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
"""Of Triton."""

SPECIALIZED = ((3, 6), (3, 7), (3, 8))
"""Triton's releases with which the kernels of `hopper` spill no register. With 3.9 they do: not timed."""


PREPARE_BLOCK = 1024
"""Numbers that a program of `prepare_kernel` converts."""

SPECIALIZED_HEADS = 2**14
"""Most b · h that they take: the shares of the state's heads are then within 32-bit offsets."""


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. `triton.cdiv`, which kernels may call too, takes the host 2 µs, and a forward asks for fifteen."""
    return -(-a // b)


class Map(NamedTuple):
    """Parameters of a feature map of two layers: weights h × in × out, biases h × out."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    @property
    def degree(self) -> int:
        return self.w1.shape[2] // self.w1.shape[1]


class Rotary(NamedTuple):
    """q and k before QK-norm (b n c), the norms' weights (c) and ε; cosines and sines of RoPE (n d), each twice."""

    q: Tensor
    k: Tensor
    weight_q: Tensor
    weight_k: Tensor
    cos: Tensor
    sin: Tensor
    eps_q: float
    eps_k: float

    @property
    def head_dim(self) -> int:
        return self.cos.shape[1]

    def arguments(self) -> dict[str, Any]:
        """Of the kernels: tensors and strides, constants, warps that hold 32 channels a thread."""
        q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.q, self.k, self.cos, self.sin))
        channels = q.shape[2]
        width = triton.next_power_of_2(channels)
        return {
            **self._replace(q=q, k=k, cos=cos, sin=sin)._asdict(),
            "weight_q": self.weight_q.contiguous(),
            "weight_k": self.weight_k.contiguous(),
            "N": q.shape[1],
            "stride_qb": q.stride(0),
            "stride_qn": q.stride(1),
            "stride_kb": k.stride(0),
            "stride_kn": k.stride(1),
            "stride_cos": cos.stride(0),
            "stride_sin": sin.stride(0),
            "C": channels,
            "D": self.head_dim,
            "WIDTH": width,
            "num_warps": min(16, max(1, width // 1024)),
        }


class Prepared(NamedTuple):
    """w1, w2 and S in the dtype of the tokens; b1 and b2 in one tensor (2 h P·D), and z, in float32."""

    w1: Tensor
    w2: Tensor
    biases: Tensor
    state: Tensor | None
    mass: Tensor | None


class Plan:
    """Shape, dtype and device of a tensor of tokens (b n h d), and all that follows from them."""

    def __init__(self, x: Tensor, degree: int = 1) -> None:
        self.b, self.n, self.h, self.d = x.shape
        self.p, self.f = degree, degree * self.d
        self.dtype, self.device = x.dtype, x.device
        self.half = x.dtype.itemsize == 2
        self.arch: int | None = None
        self.processors = PROCESSORS
        if not INTERPRETED:
            self.arch, self.processors = _hardware(x.device)

    @property
    def width(self) -> int:
        """Features that go by at a time where a product runs over all of them: a tile's sides are powers of two."""
        return self.f if self.f & (self.f - 1) == 0 else self.d

    @property
    def precision(self) -> str:
        """How float32 products are taken: PyTorch's own setting decides whether TF32 alone will do."""
        if self.half or INTERPRETED:
            return "ieee"
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"

    @property
    def copy_engine(self) -> bool:
        """Whether tiles are moved by tensor descriptors (compute capability 9.0 and later) or by pointers."""
        return self.arch is None or self.arch >= 90

    @property
    def specialized(self) -> bool:
        """Whether the kernels of `hopper` are taken, where there is one."""
        fits = self.half and (self.d, self.p) == (128, 2) and self.b * self.h <= SPECIALIZED_HEADS
        return fits and self.arch == 90 and RELEASE in SPECIALIZED

    def token_argument(self, x: Tensor, rows: int) -> Any:
        """A tensor of tokens, read or written `rows` tokens of one head at a time, as the kernels take it."""
        return TensorDescriptor(*token_blocks(x, rows)) if self.copy_engine else x

    def matrix_argument(self, x: Tensor, rows: int, columns: int) -> Any:
        """A dense stack of matrices, in blocks of `rows` × `columns`, as the kernels take it."""
        return TensorDescriptor(*matrix_blocks(x, rows, columns)) if self.copy_engine else x

    def blocks(self, kernel: Kernel) -> Blocks:
        return blocks_of(kernel, head_dim=self.d, degree=self.p, dtype=self.dtype, arch=self.arch)

    def launch(self, cut: Blocks) -> dict[str, Any]:
        """Warps of a kernel, depth of its pipeline, limit of its registers."""
        return {"num_warps": cut.warps, "num_stages": cut.stages, "maxnreg": cut.registers}

    def options(self, cut: Blocks) -> dict[str, Any]:
        """`launch`, and the constants of the kernels that compute products."""
        return {"BM": cut.rows, "D": self.d, "PREC": self.precision, "TMA": self.copy_engine} | self.launch(cut)

    def map_options(self, cut: Blocks) -> dict[str, Any]:
        """`options` and the constants of the kernels that compute φ."""
        return {"BJ": cut.hidden, "P": self.p, "FAST": self.half and not INTERPRETED} | self.options(cut)

    def tokens(self) -> Tensor:
        return torch.empty(self.b, self.n, self.h, self.d, dtype=self.dtype, device=self.device)

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def states(self, shares: int) -> Tensor:
        """Room for so many shares of S̄ and z̄, a record for each head."""
        return self.float32(shares, self.b * self.h, self.f * (self.d + 1))

    def shares(self, tiles: int, programs: int, waves: int = 2) -> tuple[int, int]:
        """Split `tiles` so that `programs` per share fill the device `waves` times: (shares, tiles of each)."""
        wanted = max(1, min(tiles, waves * self.processors // programs))
        each = cdiv(tiles, wanted)
        return cdiv(tiles, each), each


def prepare(
    phi: Map, plan: Plan, *, scale: float, state: Tensor | None = None, mass: Tensor | None = None,
    state_scale: float = 1.0,
) -> Prepared:  # fmt: skip
    """`phi` times `scale`, and S and z (`state`, `mass`), where there are any, times `state_scale`."""
    phi = Map(*(parameter.contiguous() for parameter in phi))
    state, mass = (None if x is None else x.contiguous() for x in (state, mass))
    made = Prepared(
        w1=torch.empty(phi.w1.shape, dtype=plan.dtype, device=plan.device),
        w2=torch.empty(phi.w2.shape, dtype=plan.dtype, device=plan.device),
        biases=plan.float32(2, plan.h, plan.f),
        state=None if state is None else torch.empty(state.shape, dtype=plan.dtype, device=plan.device),
        mass=None if mass is None else plan.float32(*mass.shape),
    )
    counts = [0 if x is None else x.numel() for x in (phi.w1, phi.w2, phi.b1, phi.b2, state, mass)]
    prepare_kernel[(sum(cdiv(count, PREPARE_BLOCK) for count in counts),)](
        **phi._asdict(),
        state=state,
        mass=mass,
        made_w1=made.w1,
        made_w2=made.w2,
        made_biases=made.biases,
        made_state=made.state,
        made_mass=made.mass,
        of_w1=counts[0],
        of_w2=counts[1],
        of_b=counts[2],
        of_state=counts[4],
        of_mass=counts[5],
        scale=scale,
        state_scale=state_scale,
        BLOCK=PREPARE_BLOCK,
    )
    return made


@cache
def _hardware(device: torch.device) -> tuple[int, int]:
    """10·major + minor of the compute capability, and the multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def specialized_launches() -> Any:
    """The module `hopper.launch`: imported when it is needed, since Gluon changes with Triton's releases."""
    from .hopper import launch

    return launch


def linear_count(n: int, rate: int) -> int:
    """|T_L| for a rate as the kernels take it: 0 stands for "linear"."""
    named: Rate = rate or "linear"
    return n - softmax_count(n, named)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Arguments stride_…b, stride_…n, stride_…h of a tensor of tokens."""
    return {f"stride_{name}b": x.stride(0), f"stride_{name}n": x.stride(1), f"stride_{name}h": x.stride(2)}


def token_set(table: Tensor | None, rate: int) -> dict[str, Any]:
    """Arguments that name the linear tokens: all (rate 0), all but the leaders of runs, or all but those of `table`."""
    stride = 0 if table is None else table.stride(0)
    return {"table": table, "stride_table": stride, "RATE": rate, "TABLE": table is not None}
