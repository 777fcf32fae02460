"""Time and memory of calls that take turns: A B C, A B C, …, so that a machine that slows down does so for all."""

import collections
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Key = TypeVar("Key")
Call = Callable[[], object]

MIN_ROUNDS = 6
"""From six on there is a 95 % interval for a median (see `median_interval`)."""
MAX_ROUNDS = 60
TURN_SECONDS = 0.03
"""A turn is repeated until it takes this long, so that what it costs to begin and end one does not show."""
LEAD_SECONDS = 0.1
"""On a GPU calls that are not timed lead a turn in, for up to this long: at most `MAX_REPEATS`, and none that take
longer. At the limit of its power a GPU lowers its clock, more for some calls than for others, and the first of a turn
would still have the clock that another call left."""
MAX_REPEATS = 200


class Clock:
    """Marks on the device's own time line: events on a GPU, which nobody waits for; wall-clock time on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Now, on the device."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until everything that was asked for is done."""
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, start: Any, stop: Any) -> float:
        """Between two marks, after `wait`."""
        return 1000 * (stop - start) if self.device.type == "cpu" else start.elapsed_time(stop)


@dataclass(frozen=True)
class Summary:
    """p20, p50 and p80 of one variant's rounds, in ms per call."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Summary":
        return cls(*(float(value) for value in np.percentile(times, (20, 50, 80))))


def interleave(
    calls: Mapping[Key, Call],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    lead: float = LEAD_SECONDS,
) -> dict[Key, list[float]]:
    """Milliseconds per call, a list with one entry per round. The calls are warm: each has been made once.

    In a round every call has its turn, in the same order, beginning with another one each time. A turn is many calls in
    a row that nobody waits for, so that on a GPU the time of launching them counts only where the GPU is faster than
    the launches. There it begins when the turn before has ended, with `lead` seconds of calls that are not timed.
    Rounds go on for `seconds`, but there are at least `min_rounds` and at most `MAX_ROUNDS`.
    """
    clock = Clock(device)
    clock.wait()
    once = {key: time_once(call, clock) for key, call in calls.items()}
    repeats = {key: _repeats(milliseconds) for key, milliseconds in once.items()}
    leads = {key: _lead(milliseconds, lead, device) for key, milliseconds in once.items()}
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order = collections.deque(calls)
    began = time.monotonic()
    for done in range(MAX_ROUNDS):
        if done >= min_rounds and time.monotonic() - began > seconds:
            break
        turns = {}
        for key in order:
            clock.wait()
            for _ in range(leads[key]):
                calls[key]()
            start = clock.mark()
            for _ in range(repeats[key]):
                calls[key]()
            turns[key] = (start, clock.mark())
        clock.wait()
        for key, (start, stop) in turns.items():
            times[key].append(clock.milliseconds(start, stop) / repeats[key])
        order.rotate(-1)
    return times


def time_once(call: Call, clock: Clock) -> float:
    """Milliseconds of one call by itself."""
    start = clock.mark()
    call()
    stop = clock.mark()
    clock.wait()
    return clock.milliseconds(start, stop)


def _repeats(milliseconds: float) -> int:
    return max(1, min(MAX_REPEATS, math.ceil(1000 * TURN_SECONDS / max(milliseconds, 1e-6))))


def _lead(milliseconds: float, seconds: float, device: torch.device) -> int:
    """How many calls lead a turn in: none on the CPU, and none that would take longer than the lead-in."""
    return 0 if device.type == "cpu" else min(MAX_REPEATS, int(1000 * seconds / max(milliseconds, 1e-6)))


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes on the GPU that one call needs above what is there before it; None on the CPU, where nobody counts."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def speedup(baseline: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster than `baseline`: the median over rounds of their ratio, and its 95 % interval."""
    ratios = [base / value for base, value in zip(baseline, times, strict=True)]
    return statistics.median(ratios), *median_interval(ratios)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval for the median of what `values` are drawn from, whatever that is: two of the sorted values.

    The median lies outside the k-th smallest and k-th largest of n values with probability 2·P(Bin(n, ½) < k). Of fewer
    than six values it is all of them, with less confidence than asked for.
    """
    ordered, n = sorted(values), len(values)
    below, skipped = 0.0, 0
    while (below := below + math.comb(n, skipped) / 2**n) <= (1 - confidence) / 2:
        skipped += 1
    skipped = max(0, skipped - 1)
    return ordered[skipped], ordered[n - 1 - skipped]
