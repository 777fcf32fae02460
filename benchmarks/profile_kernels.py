"""Where the operator's time goes on a GPU: kernels of a forward and a training step, work space, and the host's part.

    python benchmarks/profile_kernels.py

Wan2.1 1.3B at 81×480×832 (32,760 tokens, 12 heads × 128, bfloat16, maps in float32), normalizer `mean` but where it
says `max`. Work spaces are set as (bytes, tensors of tokens); a time is the median of 7, of two steps each.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from attention_surgery.layers.feature_map import FeatureMap
from attention_surgery.ops.triton import backward
from attention_surgery.ops.triton.path import hybrid_attention

TOKENS, HEADS, HEAD_DIM = 32_760, 12, 128
WORKSPACES = ((2**28, 3), (2**27, 2), (2**27, 1), (2**26, 0), (2**25, 0), (2**28, 3))


def inputs(tokens: int, *, gradients: bool) -> list[Tensor]:
    """q, k and v."""
    size = (1, tokens, HEADS, HEAD_DIM)
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=gradients) for _ in range(3)]


def median(step: Callable[[], Any], count: int) -> float:
    """Milliseconds of one step, as a program that does not wait for each sees it."""
    step()
    torch.cuda.synchronize()
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 2)
    return sorted(times)[count // 2]


def show_kernels(name: str, step: Callable[[], Any], rows: int = 25) -> None:
    """Microseconds and launches of each kernel in one step."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    print("==", name)
    for event in events[:rows]:
        print(f"{event.self_device_time_total / 5:9.1f} us {event.count / 5:5.1f}x {event.key[:110]}")
    print("total us", sum(event.self_device_time_total for event in events) / 5)


def main() -> None:
    torch.manual_seed(0)
    phi_q, phi_k = (FeatureMap(HEADS, HEAD_DIM).cuda() for _ in range(2))
    parameters = [*phi_q.parameters(), *phi_k.parameters()]
    q, k, v = inputs(TOKENS, gradients=True)
    gradient = torch.randn_like(q)

    def hybrid(rate: int, normalizer: Any = "mean") -> Tensor:
        return hybrid_attention(q, k, v, phi_q, phi_k, rate=rate, normalizer=normalizer, attention_backend="native")

    def dense() -> Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def train(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), (q, k, v, *parameters), gradient, allow_unused=True)

    print("dense f+b", median(train(dense), 5))
    default = backward.WORKSPACE_BYTES, backward.WORKSPACE_TENSORS
    for rate in (2, 8):
        for size, tensors in WORKSPACES:
            backward.WORKSPACE_BYTES, backward.WORKSPACE_TENSORS = size, tensors
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            taken = median(train(lambda rate=rate: hybrid(rate)), 7)
            peak = (torch.cuda.max_memory_allocated() - base) / 2**20
            print(f"R={rate} workspace {size / 2**20:.0f} MiB/{tensors} tensors: {taken:.3f} ms, peak +{peak:.0f} MiB")
    backward.WORKSPACE_BYTES, backward.WORKSPACE_TENSORS = default

    with torch.no_grad():
        show_kernels("fwd R=8", lambda: hybrid(8))
        show_kernels("fwd R=2", lambda: hybrid(2))
        show_kernels("fwd max R=8", lambda: hybrid(8, "max"))
    show_kernels("f+b R=8", train(lambda: hybrid(8)))
    show_kernels("f+b R=2", train(lambda: hybrid(2)))

    q, k, v = inputs(1024, gradients=False)
    with torch.no_grad():
        for _ in range(20):
            hybrid(8)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            hybrid(8)
        torch.cuda.synchronize()
        print("host us per op", (time.perf_counter() - start) / 200 * 1e6)


if __name__ == "__main__":
    main()
