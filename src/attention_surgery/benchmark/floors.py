"""The least time that the operator can take: what it must compute and move, over what a device can do.

Of normalizer "mean", whose three parts are a kernel each: the softmax part; the state, φ_k on the linear tokens times
v; the merge, φ_q on all tokens, read out of the state and added to the softmax part. Each is as fast at best as the
slower of its arithmetic and its traffic, and they follow one another.
"""

from dataclasses import dataclass

from ..cost.flops import block_flops
from ..ops.tokens import softmax_count
from ..rates import Rate
from .shapes import GPU_SHAPES, Shape

RATES: tuple[Rate, ...] = (1, 2, 4, 8)
ELEMENT = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True)
class Device:
    """What was measured of a device: FLOP/s of a large bfloat16 matrix product, bytes/s of a copy (read + written)."""

    name: str
    flops: float
    bandwidth: float


DEVICES = (Device("H100", 798e12, 3.0e12), Device("H200", 788e12, 4.3e12))


@dataclass(frozen=True)
class Part:
    """FLOPs and bytes of one kernel."""

    flops: float
    bytes: float

    def milliseconds(self, device: Device) -> float:
        """The floor: arithmetic or traffic, whichever takes longer."""
        return 1e3 * max(self.flops / device.flops, self.bytes / device.bandwidth)


@dataclass(frozen=True)
class Floor:
    """The parts of the operator at one rate; state and merge are empty for dense attention."""

    softmax: Part
    state: Part
    merge: Part
    maps: float
    """FLOPs of φ, which are in state and merge."""

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.softmax, self.state, self.merge

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)


def operator_floor(shape: Shape, rate: Rate) -> Floor:
    """Counted by `attention_surgery.cost`, split by which tokens each product runs over."""
    spec, n = shape.spec, shape.tokens
    counted = block_flops(spec, rate, n)
    soft = softmax_count(n, rate)
    linear, tensor = n - soft, n * spec.dim * ELEMENT
    softmax = Part(4 * n * soft * spec.dim, 2 * tensor + 2 * soft * spec.dim * ELEMENT)
    if rate == 1:
        return Floor(softmax, Part(0, 0), Part(0, 0), 0)
    accumulated = 2 * linear * 2 * spec.head_dim * spec.dim  # P = 2
    read_out = counted.core - softmax.flops - accumulated
    of_keys = counted.feature_maps * linear / (n + linear)
    state = Part(of_keys + accumulated, 2 * linear * spec.dim * ELEMENT)
    merge = Part(counted.feature_maps - of_keys + read_out, 3 * tensor)
    return Floor(softmax, state, merge, counted.feature_maps)


def counts_table() -> list[str]:
    """Markdown: what the operator computes and moves, for every shape and rate."""
    lines = [
        "| shape | R | TFLOP: softmax part | φ | state and read-out | of dense | GB: softmax part | state | merge |",
        "|---|" + "--:|" * 8,
    ]
    for shape in GPU_SHAPES:
        whole = operator_floor(shape, 1).flops
        for rate in RATES:
            floor = operator_floor(shape, rate)
            linear = floor.flops - floor.softmax.flops - floor.maps
            cells = [f"{shape.title}, N = {shape.tokens:,}" if rate == 1 else "", f"{rate}"]
            cells += [f"{value / 1e12:.3f}" for value in (floor.softmax.flops, floor.maps, linear)]
            cells += [f"{100 * floor.flops / whole:.1f} %", *(f"{part.bytes / 1e9:.2f}" for part in floor.parts)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def floors_table() -> list[str]:
    """Markdown: the least time of the operator and of its parts, for every shape, rate and device."""
    lines = [
        "| shape | R | "
        + " | ".join(f"{device.name}, ms: softmax part | state | merge | op" for device in DEVICES)
        + " |",
        "|---|" + "--:|" * (1 + 4 * len(DEVICES)),
    ]
    for shape in GPU_SHAPES:
        for rate in RATES:
            cells = [shape.title if rate == 1 else "", f"{rate}"]
            for device in DEVICES:
                times = [part.milliseconds(device) for part in operator_floor(shape, rate).parts]
                cells += [f"{time:.2f}" if time else "" for time in (*times, sum(times))]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def limits_table() -> list[str]:
    """Markdown: the speed-up if every FLOP took as long as dense attention's, of the operator and of a whole model."""
    hybrid = RATES[1:]
    lines = [
        "| shape | " + " | ".join(f"op, R = {rate}" for rate in hybrid) + " | "
        + " | ".join(f"all blocks, R = {rate}" for rate in hybrid) + " |",
        "|---" + "|--:" * 2 * len(hybrid) + "|",
    ]  # fmt: skip
    for shape in GPU_SHAPES:
        dense = block_flops(shape.spec, 1, shape.tokens)
        counts = [block_flops(shape.spec, rate, shape.tokens) for rate in hybrid]
        cells = [f"{dense.core / (count.core + count.feature_maps):.2f}×" for count in counts]
        cells += [f"{dense.total / count.total:.2f}×" for count in counts]
        lines.append(f"| {shape.title} | " + " | ".join(cells) + " |")
    return lines
