"""`block_costs`: what each block costs at each rate, in FLOPs or seconds; the c_ir of Eq. 8."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from diffusers import WanTransformer3DModel

from ..errors import ConfigError
from ..models.wan import WanSpec, read_wan
from ..rates import Rate, check_rates
from .flops import block_flops
from .latency import LatencyConfig, block_latency

Unit = Literal["flops", "latency"]


def block_costs(
    model_or_config: WanSpec | WanTransformer3DModel | Mapping[str, Any] | str | Path,
    rates: Iterable[Rate] = (1, 2, 4, 8),
    *,
    unit: Unit = "flops",
    num_frames: int = 81,
    height: int = 480,
    width: int = 832,
    degree: int = 2,
    layers: int = 2,
    latency: LatencyConfig = LatencyConfig(),  # noqa: B008 (frozen)
) -> dict[int, dict[Rate, float]]:
    """The cost of every whole block at every rate: self-attention, cross-attention and feed-forward, one sample.

    The blocks of a Wan transformer have the same dimensions, so one is counted or timed per rate and stands for all.

    Args:
        model_or_config: a model, its config, a folder or a hub id (see `read_wan`); only the config is read, and a
            converted model's own rates play no part.
        rates: candidates. `select_rates` needs 1, softmax, among them.
        unit: "flops", counted on meta tensors (exact integers), or "latency", seconds measured on a block with random
            weights, as `latency` says.
        num_frames, height, width: the video, in pixels.
        degree, layers: of φ.
        latency: device, dtype and rounds of the measurement.

    Returns:
        block → rate → FLOPs or seconds.

    Raises:
        ModelError, ConfigError, RateError: as `profile`; no rates, or one that is named twice.
    """
    if unit not in ("flops", "latency"):
        raise ConfigError(f"unit {unit!r} does not exist; expected 'flops' or 'latency'")
    candidates = check_rates(rates)
    spec = read_wan(model_or_config)
    grid = spec.grid(num_frames, height, width)
    costs: dict[Rate, float]
    if unit == "flops":
        tokens = grid[0] * grid[1] * grid[2]
        costs = {rate: block_flops(spec, rate, tokens, degree=degree, layers=layers).total for rate in candidates}
    else:
        costs = block_latency(spec, candidates, grid, degree=degree, layers=layers, config=latency)
    return {block: dict(costs) for block in range(spec.blocks)}
