"""How long a GPU keeps the clock that other work left it: the operator in turns, after longer and longer lead-ins.

    python benchmarks/measure_clocks.py

Wan2.1 1.3B at 81×480×832, forward, then forward + backward. At the limit of its power a GPU lowers its clock, more for
dense attention than for a hybrid. Where turns follow each other without a lead-in, each has some of the clock of the
one before it. With a lead-in of 0.1 s or more, the SM clock and the power of the whole board, as NVML averages it, are
read during a turn.
"""

import collections
import ctypes
import math
import os
import statistics
import threading
import time
from collections.abc import Callable

import torch

from attention_surgery.benchmark.shapes import choose_shapes
from attention_surgery.benchmark.variants import Variant
from attention_surgery.benchmark.workloads import Place, operator_calls

SHAPE = "wan2.1-1.3b-480p"
LEADS = (0, 0.03, 0.1, 0.3, 1.0)
READABLE = 0.1
"""Seconds of lead-in from which the clock is read, for which every turn is waited for."""
TURN, SECONDS, ROUNDS = 0.03, 8, (5, 20)
VARIANTS = (
    *(Variant(rate=1, kernel=kernel) for kernel in ("native", "sdpa-cudnn")),
    *(Variant(rate=rate, kernel="native", backend="triton") for rate in (2, 4, 8)),
)


class Board:
    """SM clock (MHz) and power (W) of the first visible GPU, read by NVML every 4 ms from a thread."""

    def __init__(self) -> None:
        self.nvml, self.handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if not first.isdigit():
            raise RuntimeError(f"CUDA_VISIBLE_DEVICES names {first!r}; expected the number of a GPU")
        index = int(first)
        if self.nvml.nvmlInit_v2() or self.nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self.handle)):
            raise RuntimeError(f"NVML does not give GPU {index}")
        self.read: collections.deque[tuple[float, int, float]] = collections.deque(maxlen=1000)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        clock, milliwatts = ctypes.c_uint(), ctypes.c_uint()
        while True:
            self.nvml.nvmlDeviceGetClockInfo(self.handle, 1, ctypes.byref(clock))
            self.nvml.nvmlDeviceGetPowerUsage(self.handle, ctypes.byref(milliwatts))
            self.read.append((time.perf_counter(), clock.value, milliwatts.value / 1000))
            time.sleep(0.004)

    def between(self, start: float, stop: float) -> tuple[float, float]:
        """Means of what was read in that time, or of the last two readings."""
        read = list(self.read)
        inside = [(clock, power) for at, clock, power in read if start <= at <= stop]
        clocks, powers = zip(*(inside or [each[1:] for each in read[-2:]]), strict=True)
        return statistics.mean(clocks), statistics.mean(powers)


def seconds(call: Callable[[], object], count: int) -> float:
    """Of one call among `count`."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def compare(calls: dict[Variant, Callable[[], object]], lead: float, board: Board, title: str) -> None:
    """Prints, of each variant, the median time, that of dense attention over it, and clock and power."""
    once = {variant: (seconds(call, 3), seconds(call, 4))[1] for variant, call in calls.items()}
    times: dict[Variant, list[float]] = {variant: [] for variant in calls}
    readings: dict[Variant, list[tuple[float, float]]] = {variant: [] for variant in calls}
    order, began, (fewest, most) = collections.deque(calls), time.monotonic(), ROUNDS
    for done in range(most):
        if done >= fewest and time.monotonic() - began > SECONDS:
            break
        turns = {}
        for variant in order:
            for _ in range(math.ceil(lead / once[variant])):
                calls[variant]()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            count = max(1, math.ceil(TURN / once[variant]))
            start.record()
            for _ in range(count):
                calls[variant]()
            stop.record()
            turns[variant] = start, stop, count
            if lead >= READABLE:
                start.synchronize()
                began_turn = time.perf_counter()
                stop.synchronize()
                readings[variant].append(board.between(began_turn, time.perf_counter()))
        torch.cuda.synchronize()
        for variant, (start, stop, count) in turns.items():
            times[variant].append(start.elapsed_time(stop) / count)
        order.rotate(-1)
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    dense = times[min((variant for variant in calls if variant.dense), key=medians.__getitem__)]
    for variant, values in times.items():
        ratio = statistics.median(base / value for base, value in zip(dense, values, strict=True))
        line = f"{title} lead {lead} {variant.name:18s} {medians[variant]:.3f} ms {ratio:.2f}x rounds {len(values)}"
        if readings[variant]:
            clock, power = (statistics.mean(read) for read in zip(*readings[variant], strict=True))
            line += f" {clock:.0f} MHz {power:.0f} W"
        print(line, flush=True)


def main() -> None:
    place, board = Place(torch.device("cuda"), torch.bfloat16), Board()
    shape = choose_shapes(place.device, [SHAPE])[SHAPE]
    print(torch.cuda.get_device_name(), flush=True)
    for title, backward in (("forward", False), ("both", True)):
        calls = operator_calls(shape, VARIANTS, backward, place)
        for lead in LEADS:
            compare(calls, lead, board, title)


if __name__ == "__main__":
    main()
