"""Which tokens keep softmax attention: T_S of Eq. 5, one set per head.

Every pattern takes exactly one token out of each run of R consecutive tokens (the last run may be shorter), so each
head has ceil(N/R) softmax tokens and the sets are rectangular:

- "stride", the paper's: the first of each run, i mod R = 0, the same for all heads.
- "staggered": head h takes the (h mod R)-th of each run, so that over the heads every token is somewhere a softmax
  token.
- "lattice": head h takes the token at (t, y, x) with x + a·y + b·t + h = 0 (mod R), where (a, b) is the choice that
  spreads the set furthest over space and time. Where the end of a row leaves a run with none, it takes the
  (h mod R)-th; where it leaves two, the first.
"""

import math
from functools import cache
from itertools import product

import torch
from torch import BoolTensor, Tensor

from ..errors import ConfigError, TensorError
from ..rates import Pattern, Rate, check_pattern, check_rate

Grid = tuple[int, int, int]
"""Frames, rows and columns of the token grid, in latent patches."""


def softmax_count(n: int, rate: Rate) -> int:
    """|T_S|: N for rate 1, ceil(N/R) for R >= 2, 0 for "linear"."""
    return 0 if rate == "linear" else -(-n // rate)


def check_grid(n: int, pattern: Pattern, grid: Grid | None) -> None:
    """ConfigError if `pattern` needs a grid and has none; TensorError if the grid does not hold `n` tokens."""
    if pattern != "lattice":
        return
    if grid is None:
        raise ConfigError("pattern 'lattice' needs grid=(frames, rows, columns) of the tokens; got None")
    if len(grid) != 3 or math.prod(grid) != n:
        raise TensorError(f"grid {tuple(grid)} does not hold the {n} tokens that were given")


@torch.compiler.assume_constant_result
def lattice_steps(rate: int) -> tuple[int, int]:
    """The (a, b) for which the shortest vector of the lattice {x + a·y + b·t = 0 mod R} is longest (fewest ties)."""
    return _search_steps(rate)


@cache
def _search_steps(rate: int) -> tuple[int, int]:
    def spread(steps: tuple[int, int]) -> tuple[int, int]:
        reach = range(-rate, rate + 1) if rate <= 8 else range(-8, 9)
        norms = [
            t * t + y * y + x * x
            for t, y, x in product(reach, reach, range(-rate, rate + 1))
            if (t, y, x) != (0, 0, 0) and (x + steps[0] * y + steps[1] * t) % rate == 0
        ]
        return min(norms), -norms.count(min(norms))

    candidates = range(min(rate, 17))
    return max(product(candidates, candidates), key=spread)


def softmax_token_index(
    n: int,
    rate: int,
    *,
    pattern: Pattern = "stride",
    heads: int = 1,
    grid: Grid | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Positions of the softmax tokens of each head, ascending: int64 (heads, ceil(n/rate)), for an integer rate."""
    runs = torch.arange(0, n, rate, device=device)
    head = torch.arange(heads, device=device)
    length = (n - runs).clamp(max=rate)
    if pattern == "stride":
        return runs.expand(heads, -1)
    offset = head[:, None] % rate % length
    if pattern == "staggered":
        return runs + offset
    check_grid(n, pattern, grid)
    assert grid is not None
    a, b = lattice_steps(rate)
    token = torch.arange(len(runs) * rate, device=device)
    t, y, x = token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]
    on_lattice = (x + a * y + b * t + head[:, None]) % rate == 0
    on_lattice = (on_lattice & (token < n)).unflatten(1, (len(runs), rate))
    first = on_lattice.to(torch.uint8).argmax(dim=-1)
    return runs + torch.where(on_lattice.any(dim=-1), first, offset)


def linear_token_index(softmax_index: Tensor, n: int, rate: int) -> Tensor:
    """Positions of the other tokens, T_L = T \\ T_S, ascending: int64 (heads, n - ceil(n/rate))."""
    runs = torch.arange(0, n, rate, device=softmax_index.device)
    within = torch.arange(rate - 1, device=softmax_index.device)
    offset = (softmax_index - runs)[..., None]
    index = runs[:, None] + within + (within >= offset)
    return index.flatten(1)[:, : n - softmax_index.shape[1]]


def split_tokens(
    rate: int, pattern: Pattern, grid: Grid | None, *tensors: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Split each tensor (b n h d) into its softmax tokens (b ceil(n/rate) h d) and its linear tokens (b … h d).

    The softmax tokens of "stride" are a strided view; the other sets are gathered.
    """
    _, n, heads, _ = tensors[0].shape
    index = softmax_token_index(n, rate, pattern=pattern, heads=heads, grid=grid, device=tensors[0].device)
    rest = linear_token_index(index, n, rate)
    if pattern == "stride":
        return tuple(x[:, ::rate] for x in tensors), tuple(x.index_select(1, rest[0]) for x in tensors)
    return tuple(take(x, index) for x in tensors), tuple(take(x, rest) for x in tensors)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of `x` (b n h d) at `index` (h m), each head's own: b m h d."""
    return x.gather(1, index.T[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


def softmax_token_mask(
    n: int, rate: Rate, *, pattern: Pattern = "stride", heads: int = 1, grid: Grid | None = None
) -> BoolTensor:
    """T_S as a mask: bool (heads, n), true where a token keeps softmax attention.

    Args:
        n: number of tokens N.
        rate: 1 gives all tokens, "linear" none.
        pattern: "stride" | "staggered" | "lattice" (see the module).
        heads: number of heads.
        grid: (frames, rows, columns) of the tokens, for "lattice".

    Raises:
        RateError, ConfigError, TensorError: for a rate, pattern or grid that does not exist or does not fit.
    """
    check_rate(rate)
    check_grid(n, check_pattern(pattern), grid)
    if n < 1 or heads < 1:
        raise TensorError(f"a token mask needs n >= 1 and heads >= 1; got n={n}, heads={heads}")
    mask = torch.zeros(heads, n, dtype=torch.bool)
    if rate != "linear":
        mask.scatter_(1, softmax_token_index(n, rate, pattern=pattern, heads=heads, grid=grid), True)
    return mask  # type: ignore[return-value]
