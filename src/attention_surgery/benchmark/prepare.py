"""Checks and compilations before anything is timed, in as many processes as the machine has room for."""

import gc
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
import torch._inductor.config

from .cases import Case
from .shapes import Shape
from .variants import Variant
from .verification import Verdict, verify
from .workloads import Place, make_calls

MAX_WORKERS = 8
THREADS = 2
"""Of each process, for compiling and on the CPU."""
RECOMPILATIONS = 128
"""Every shape, rate and pass is a compilation of the same block's code; PyTorch's own limit is 8."""


@dataclass(frozen=True)
class Check:
    """What one verdict stands for: a variant at a head dim, by itself or within a model."""

    variant: Variant
    head_dim: int
    time_per_token: bool
    model: bool

    @classmethod
    def of(cls, variant: Variant, case: Case) -> "Check":
        shape, model = case.shape, case.scope != "op"
        return cls(replace(variant, graphed=False), shape.spec.head_dim, model and shape.time_per_token, model)


Verdicts = dict[Check, Verdict]


def count_workers(asked: int, device: torch.device) -> int:
    """Processes beside this one; 0 on the CPU, unless asked for."""
    return asked or (0 if device.type == "cpu" else min(MAX_WORKERS, os.cpu_count() or 1))


def prepare(
    cases: Sequence[Case], place: Place, workers: int, verdicts: Verdicts, *, seconds: float = math.inf
) -> None:
    """Verify every variant of `cases` that has no verdict yet, into `verdicts`, and compile what will be compiled.

    Without `workers` everything is verified here, and nothing compiled beforehand. With them no compilation begins
    after `seconds`.

    Kernels and graphs are compiled to PyTorch's and Triton's caches on disk, where this process finds them. A
    compilation that fails here fails again, and is named, when its case comes. The models of a block stand for those of
    a whole transformer: only blocks are compiled.
    """
    checks: dict[Check, Shape] = {}
    for case in cases:
        for variant in case.variants:
            check = Check.of(variant, case)
            if check not in verdicts and not (variant.stock and check.model):
                checks.setdefault(check, case.shape)
    if not workers:
        for check, shape in checks.items():
            verdicts[check] = verify(check.variant, shape, place, model=check.model)
        return
    compilations: dict[tuple[object, ...], Case] = {}
    for case in cases:
        for variant in case.variants:
            if variant.compiled:
                key = (case.scope == "op", case.shape, case.backward, variant)
                compilations.setdefault(key, replace(case, variants=(variant,)))
    began = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin) as pool:
        waiting: dict[Check, Future[Verdict]] = {
            check: pool.submit(run_check, check, shape, place) for check, shape in checks.items()
        }
        rest = [pool.submit(run_once, case, place) for case in compilations.values()]
        for check, future in waiting.items():
            if not isinstance(future.exception(), BrokenProcessPool):  # it is checked here when its case comes
                verdicts[check] = future.result()
        wait(rest, timeout=max(0.0, seconds - (time.monotonic() - began)))
        for future in rest:
            future.cancel()


def allow_recompilations() -> None:
    """Let this process keep a compiled block for every shape, rate and pass."""
    torch._dynamo.config.recompile_limit = RECOMPILATIONS


def run_check(check: Check, shape: Shape, place: Place) -> Verdict:
    """The verdict on one check, in a process that goes on to others."""
    verdict = verify(check.variant, shape, place, model=check.model)
    _free(place)
    return verdict


def run_once(case: Case, place: Place) -> None:
    """Every call of `case` once, likewise; of a transformer the first block."""
    scope = "op" if case.scope == "op" else "block"
    for call in make_calls(replace(case, scope=scope), place).values():
        call()
    _free(place)


def _begin() -> None:
    torch.set_num_threads(THREADS)
    torch._inductor.config.compile_threads = THREADS
    allow_recompilations()


def _free(place: Place) -> None:
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
