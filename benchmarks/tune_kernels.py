"""Checks the Triton kernels on the GPU at hand, then times block sizes and pieces; prints tables, writes a CSV.

    python benchmarks/tune_kernels.py --output results [--tokens 32760] [--heads 12] [--head-dim 128] [--only merge]

Nothing is timed unless tests/test_triton_gpu.py passes. Candidates that win go into `ops/triton/blocks.py` by hand, if
tests/test_triton_compiled.py takes them.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from attention_surgery import FeatureMap, hybrid_attention
from attention_surgery.ops import eager
from attention_surgery.ops.triton import backward, blocks, forward, plan
from attention_surgery.ops.triton.blocks import Blocks
from attention_surgery.ops.triton.plan import Map
from attention_surgery.rates import Normalizer, Pattern, Rate

plan.SPECIALIZED = ()  # block sizes are those of the general kernels

CHECKS = [sys.executable, "-m", "pytest", "-q", "-n", "8", "-m", "gpu", "tests/test_triton_gpu.py"]
CANDIDATES: dict[str, list[Blocks]] = {
    "state": [
        Blocks(rows=r, hidden=j, warps=w, stages=s, resident=res)
        for r, j, w, s, res in [
            (64, 128, 8, 2, True), (64, 256, 8, 2, True), (32, 128, 8, 2, True), (64, 128, 8, 1, True),
            (64, 128, 8, 2, False),
        ]
    ],
    "merge": [
        Blocks(rows=r, hidden=j, warps=w, stages=s)
        for r, j, w, s in [
            (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3),
        ]
    ],
    "attend": [
        Blocks(rows=r, across=a, warps=w, stages=s, registers=m)
        for r, a, w, s, m in [
            (128, 128, 8, 2, None), (128, 128, 8, 3, None), (128, 64, 8, 3, None), (128, 64, 8, 2, 128),
            (64, 64, 4, 2, None), (64, 64, 4, 2, 128), (64, 64, 4, 3, None), (128, 32, 8, 3, 128),
            (128, 32, 4, 3, None), (256, 32, 8, 3, None), (256, 64, 16, 2, None),
        ]
    ],
    "output_gradient": [Blocks(rows=r, warps=w) for r, w in [(32, 4), (64, 4), (64, 8)]],
    "map_gradient": [
        Blocks(rows=r, hidden=j, warps=w, stages=s)
        for r, j, w, s in [(64, 32, 4, 3), (64, 32, 4, 2), (64, 16, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2)]
    ],
    "value_gradient": [Blocks(rows=r, warps=w) for r, w in [(64, 4), (128, 8), (64, 8)]],
    "token_product": [
        Blocks(rows=r, warps=w, stages=s)
        for r, w, s in [(64, 8, 2), (64, 8, 3), (64, 4, 2), (64, 4, 3), (32, 4, 4), (32, 8, 4), (32, 8, 3)]
    ],
    "softmax_tokens": [Blocks(rows=r, warps=4) for r in (32, 64)],
    "sum_products": [Blocks(rows=r, warps=w) for r, w in [(32, 4), (16, 4), (64, 8)]],
    "query_gradient": [
        Blocks(rows=r, across=a, warps=w, stages=s, registers=m)
        for r, a, w, s, m in [
            (128, 64, 8, 2, None), (128, 64, 8, 3, None), (64, 64, 4, 2, None), (64, 64, 4, 3, None),
        ]
    ],
    "key_gradient": [
        Blocks(rows=r, across=a, warps=w, stages=s)
        for r, a, w, s in [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)]
    ],
}  # fmt: skip


def milliseconds(run: Callable[[], object], repeats: int = 12) -> float:
    """Median time of one call by CUDA events, after three warm-ups. All are queued before the first one starts."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda._sleep(60_000_000)  # about 30 ms
    for start, stop in zip(*events, strict=True):
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in zip(*events, strict=True))


def make(options: argparse.Namespace):
    """q, k, v and a gradient of y; φ_q and φ_k."""
    torch.manual_seed(0)
    h, d = options.heads, options.head_dim
    tensors = [torch.randn(1, options.tokens, h, d, device="cuda").bfloat16() for _ in range(4)]
    return *tensors, FeatureMap(h, d).cuda(), FeatureMap(h, d).cuda()


def warm(task: tuple[str, argparse.Namespace]) -> str:
    """Compile the candidates of one kernel, so that the timing finds them in Triton's cache; what could not be."""
    kernel, options = task
    small = argparse.Namespace(**vars(options) | {"tokens": 1032})
    pieces, default, failed = make_pieces(small), blocks.HOPPER[kernel, options.head_dim], []
    for candidate in CANDIDATES[kernel]:
        blocks.HOPPER[kernel, options.head_dim] = candidate
        try:
            pieces[kernel]()
        except triton.runtime.errors.OutOfResources as error:
            failed.append(f"{kernel} {candidate}: {error}")
    blocks.HOPPER[kernel, options.head_dim] = default
    return "\n".join(failed)


def compile_candidates(options: argparse.Namespace) -> None:
    """In as many processes as there are cores; what cannot be compiled is printed."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for failed in pool.map(warm, [(kernel, options) for kernel in options.only]):
            print(failed, end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests first")
    options = parser.parse_args()
    began = time.time()
    rows: list[dict] = []
    options.output.mkdir(parents=True, exist_ok=True)
    print(
        torch.cuda.get_device_name(), torch.__version__, triton.__version__, torch.backends.cudnn.version(), flush=True
    )
    if not options.unchecked and subprocess.run(CHECKS, check=False).returncode:
        sys.exit("a check failed: nothing is timed")
    compile_candidates(options)
    print(f"checked and compiled after {time.time() - began:.0f} s", flush=True)
    try:
        measure(options, rows, began)
    finally:
        with open(options.output / "tune_kernels.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["kind", "name", "value"])
            writer.writeheader()
            writer.writerows(rows)


def make_pieces(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is timed by itself: the launches that hold each kernel, at rate 8."""
    n, d, rate = options.tokens, options.head_dim, 8
    q, k, v, g, phi_q, phi_k = make(options)
    map_q, map_k = (Map(*(x.detach() for x in (*p.weights[:1], *p.biases[:1], *p.weights[1:], *p.biases[1:])))
                    for p in (phi_q, phi_k))  # fmt: skip
    k_soft, v_soft = k[:, ::rate], v[:, ::rate]
    m = k_soft.shape[1]
    state, mass = forward.linear_state(k, v, map_k, None, rate)
    o = eager.softmax_attention(q, k_soft, v_soft, "_native_cudnn")
    mean, top_scaled = (n - m) / m / (2 * d), (n - m) / (2 * d)
    y, denominator = forward.merge(q, o, state, mass, map_q, mean)
    o_max, mass_max, top = forward.attend(q, k_soft, v_soft)
    of_max = forward.merge(q, o_max, state, mass, map_q, top_scaled, mass_max)
    scaled, delta = backward.output_gradients(g, *of_max)
    linear_grad = backward.merge_gradients(scaled, delta, None, q, state, mass, map_q, top_scaled, True)[0]

    def output_gradients() -> object:
        return backward.output_gradients(g, y, denominator)

    def merge_gradients(weights: bool = True) -> object:
        return backward.merge_gradients(scaled, delta, q, q, state, mass, map_q, mean, weights)

    def attend_gradients() -> object:
        return backward.attend_gradients(q, k_soft, v_soft, scaled, delta, top, linear_grad)

    def state_gradients() -> object:
        return backward.state_gradients(state, mass, (k_soft, v_soft), k, v, map_k, None, rate, True)

    return {
        "state": lambda: forward.linear_state(k, v, map_k, None, rate),
        "merge": lambda: forward.merge(q, o, state, mass, map_q, mean),
        "attend": lambda: forward.attend(q, k_soft, v_soft),
        "output_gradient": output_gradients,
        "map_gradient": merge_gradients,
        "value_gradient": state_gradients,
        "softmax_tokens": state_gradients,
        "token_product": merge_gradients,
        "sum_products": merge_gradients,
        "query_gradient": attend_gradients,
        "key_gradient": attend_gradients,
        "merge gradients, no weights": lambda: merge_gradients(False),
    }


def measure(options: argparse.Namespace, rows: list[dict], began: float) -> None:
    """Whole operator and pieces, then every candidate; the best of each stays for those that follow."""
    q, k, v, g, phi_q, phi_k = make(options)

    def note(kind: str, name: str, value: float) -> None:
        rows.append(dict(kind=kind, name=name, value=value))
        print(f"{kind:10s} {name:70s} {value:9.3f}", flush=True)

    def both(run: Callable[..., torch.Tensor], name: str) -> None:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.no_grad():
            note("forward", name, milliseconds(lambda: run(*inputs)))

        def step() -> None:
            for x in (*inputs, *phi_q.parameters(), *phi_k.parameters()):
                x.grad = None
            run(*inputs).backward(g)

        note("both", name, milliseconds(step, 6))

    def hybrids(label: str, cases: list[tuple[Rate, Normalizer, Pattern]]) -> None:
        for rate, normalizer, pattern in cases:
            both(
                lambda a, b, c, r=rate, m=normalizer, p=pattern: hybrid_attention(
                    a, b, c, phi_q, phi_k, rate=r, normalizer=m, pattern=p, backend="triton"
                ),
                f"{label} {normalizer} R={rate} {pattern}",
            )  # fmt: skip

    for backend in ("_native_cudnn", "_native_flash", None):
        both(lambda a, b, c, e=backend: eager.softmax_attention(a, b, c, e), f"dense {backend}")
    for rate in (2, 4, 8):
        both(
            lambda a, b, c, r=rate: eager.softmax_attention(a, b[:, ::r], c[:, ::r], None),
            f"softmax part R={rate}",
        )
    pieces = make_pieces(options)
    for name, piece in pieces.items():
        note("piece", name, milliseconds(piece, 6))
    strides: list[tuple[Rate, Normalizer, Pattern]] = [(r, m, "stride") for r in (2, 4, 8) for m in ("mean", "max")]
    hybrids("hybrid", [*strides, ("linear", "mean", "stride"), (8, "mean", "staggered")])
    for kernel in options.only:
        best = None
        for candidate in CANDIDATES[kernel]:
            if time.time() - began > options.seconds:
                print("out of time", flush=True)
                return
            blocks.HOPPER[kernel, options.head_dim] = candidate
            try:
                value = milliseconds(pieces[kernel], 8)
            except triton.runtime.errors.OutOfResources as error:
                print(kernel, candidate, error, flush=True)
                continue
            note(kernel, str(candidate), value)
            best = min(best or (value, candidate), (value, candidate), key=lambda pair: pair[0])
        assert best
        blocks.HOPPER[kernel, options.head_dim] = best[1]
        print("best", kernel, best, flush=True)
    hybrids("tuned", strides)


if __name__ == "__main__":
    main()
