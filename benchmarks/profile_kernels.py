"""Where the operator's time goes on a GPU: kernels of a forward and a training step, work space, and whole times.

    python benchmarks/profile_kernels.py

Wan2.1 1.3B at 81×480×832 (32,760 tokens, 12 heads × 128, bfloat16, maps in float32). Every result is first set beside
the PyTorch path's, at that size. A kernel's time is its sum over one call, in microseconds; a whole time is the median
of five turns that nobody waits for.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from attention_surgery import FeatureMap, hybrid_attention
from attention_surgery.ops.triton import backward

TOKENS, HEADS, HEAD_DIM = 32_760, 12, 128
KERNELS = (
    "state_kernel", "merge_kernel", "attend_kernel", "output_gradient", "map_gradient", "value_gradient",
    "softmax_tokens", "_product_kernel", "sum_products", "prepare_kernel", "sum_states", "cudnn", "elementwise",
)  # fmt: skip
WORKSPACES = (2.1, 3.1, 4.2, 8.3)
"""Tensors of tokens."""


def milliseconds(step: Callable[[], Any], count: int) -> float:
    """Of one step among `count` in a row, all of them asked for while the device still sleeps."""
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)
        begin.record()
        for _ in range(count):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return statistics.median(times[1:])


def describe_kernels(step: Callable[[], Any], calls: int = 6) -> str:
    """Microseconds of each kind of kernel in one step, and of all."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / calls for event in profiler.key_averages()}
    sums = {name: sum(time for key, time in times.items() if name in key) for name in KERNELS}
    return " ".join(f"{name}={time:.0f}" for name, time in sums.items()) + f" all={sum(times.values()):.0f} us"


def main() -> None:
    torch.manual_seed(0)
    q, k, v, dy = (
        torch.randn(1, TOKENS, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )  # fmt: skip
    phi_q, phi_k = (FeatureMap(HEADS, HEAD_DIM).cuda() for _ in range(2))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    parameters = [*phi_q.parameters(), *phi_k.parameters()]

    def forward(rate: int, normalizer: Any = "mean", backend: Any = "triton") -> Tensor:
        options = {"rate": rate, "normalizer": normalizer, "backend": backend, "attention_backend": "native"}
        return hybrid_attention(*leaves, phi_q, phi_k, **options)

    def bare(rate: int) -> Tensor:
        with torch.no_grad():
            return forward(rate)

    def both(rate: int, normalizer: Any = "mean", backend: Any = "triton") -> list[Tensor]:
        y = forward(rate, normalizer, backend)
        return [y.detach(), *torch.autograd.grad(y, [*leaves, *parameters], dy)]

    def dense() -> Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)

    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    for normalizer in ("mean", "max"):
        pairs = zip(both(8, normalizer), both(8, normalizer, "eager"), strict=True)
        errors = [float((ours.float() - theirs.float()).norm() / theirs.float().norm()) for ours, theirs in pairs]
        print(normalizer, "beside the PyTorch path:", *(f"{error:.4f}" for error in errors))
    print("forward R=8:", describe_kernels(lambda: bare(8)))
    print("forward + backward R=8:", describe_kernels(lambda: both(8)))
    with torch.no_grad():
        whole = milliseconds(dense, 6)
    trained = milliseconds(lambda: torch.autograd.grad(dense(), leaves, dy), 3)
    for rate in (2, 4, 8):
        hybrid, step = milliseconds(lambda r=rate: bare(r), 10), milliseconds(lambda r=rate: both(r), 5)
        print(f"R={rate}: forward {hybrid:.3f} ms of {whole:.2f}, forward + backward {step:.3f} ms of {trained:.2f}")
    default = backward.WORKSPACE_TENSORS
    for tensors in WORKSPACES:
        backward.WORKSPACE_TENSORS = tensors
        both(8)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(8)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        print(f"work space of {tensors} tensors: {milliseconds(lambda: both(8), 5):.3f} ms, peak +{peak:.0f} MiB")
    backward.WORKSPACE_TENSORS = default


if __name__ == "__main__":
    main()
