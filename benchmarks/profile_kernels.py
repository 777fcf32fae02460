"""Where the time goes on a GPU.

    python benchmarks/profile_kernels.py            # of the operator: kernels, work space, whole times
    python benchmarks/profile_kernels.py norms      # of QK-norm and RoPE
    python benchmarks/profile_kernels.py blocks     # of compiled blocks, dense and at R = 8: every kernel

The operator at the size of Wan2.1 1.3B at 81×480×832 (32,760 tokens, 12 heads × 128, bfloat16, maps in float32), the
others also at that of Wan2.2 5B at 81×704×1280. Every result of ours is first set beside the PyTorch path's, at that
size. A kernel's time is its sum over one call, in microseconds; a whole time is the median of five turns that nobody
waits for.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from attention_surgery import FeatureMap, hybrid_attention
from attention_surgery.benchmark.shapes import GPU_SHAPES
from attention_surgery.benchmark.variants import Variant
from attention_surgery.benchmark.workloads import (
    Place,
    block_calls,
    build_transformer,
    first_block_inputs,
    transformer_inputs,
    wear,
)
from attention_surgery.layers.projections import rotate
from attention_surgery.ops.triton import backward, functions, operators

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


def kernel_times(step: Callable[[], Any], calls: int = 6) -> dict[str, float]:
    """Microseconds of each kernel in one step, by name."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / calls for event in profiler.key_averages()}


def describe_kernels(step: Callable[[], Any]) -> str:
    """Microseconds of each kind of kernel in one step, and of all."""
    times = kernel_times(step)
    sums = {name: sum(time for key, time in times.items() if name in key) for name in KERNELS}
    return " ".join(f"{name}={time:.0f}" for name, time in sums.items()) + f" all={sum(times.values()):.0f} us"


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative, by the norms of all numbers."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm())


def profile_norms() -> None:
    """QK-norm and RoPE of q and k, and the gradients: our kernels beside the modules that they stand for."""
    for tokens, heads in ((TOKENS, HEADS), (18_480, 24)):
        torch.manual_seed(0)
        width = heads * HEAD_DIM
        x = [torch.randn(1, tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
        weights = [torch.randn(width, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
        angles = torch.randn(tokens, HEAD_DIM // 2, device="cuda").repeat_interleave(2, 1)
        cos, sin = angles.cos(), angles.sin()
        grads = [torch.randn(1, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

        def stock(each: Tensor, weight: Tensor, heads: int = heads, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            normed = torch.nn.functional.rms_norm(each, weight.shape, weight, 1e-6)
            return rotate(normed.unflatten(2, (heads, -1)), cos[None, :, None], sin[None, :, None])

        ours = functions.Rotated.apply(*x, *weights, cos, sin, 1e-6, 1e-6)
        theirs = [stock(each, weight) for each, weight in zip(x, weights, strict=True)]
        slopes = [torch.autograd.grad(y, [*x, *weights], grads, retain_graph=True) for y in (ours, theirs)]
        pairs = [*zip(ours, theirs, strict=True), *zip(*slopes, strict=True)]
        print(f"{tokens} × {width}: beside PyTorch's", *(f"{distance(*pair):.4f}" for pair in pairs))
        arguments = [each.detach() for each in (*x, *weights, cos, sin)]
        forward = milliseconds(lambda a=arguments: operators.rotary(*a, 1e-6, 1e-6), 10)
        both = milliseconds(lambda a=arguments, g=grads: operators.rotary_backward(*g, *a, 1e-6, 1e-6), 10)
        print(f"{tokens} × {width}: forward {1000 * forward:.1f} us, gradients {1000 * both:.1f} us")


def profile_blocks() -> None:
    """Every kernel of one compiled block, the longest first."""
    place = Place(torch.device("cuda"), torch.bfloat16)
    for shape in GPU_SHAPES:
        if shape.name not in ("wan2.1-1.3b-480p", "wan2.2-5b-704p"):
            continue
        model = build_transformer(shape, place, blocks=1)
        inputs = first_block_inputs(model, transformer_inputs(shape, place))
        for variant in (
            Variant(rate=1, kernel="native", compiled=True),
            Variant(rate=8, kernel="native", backend="triton", compiled=True),
        ):
            call = block_calls({variant: wear(model, variant, variant.rate)}, inputs, False)[variant]
            times = kernel_times(call)
            print(f"{shape.name}, {variant.name}: {sum(times.values()):.0f} us")
            for name, time in sorted(times.items(), key=lambda item: -item[1]):
                if time >= 1:
                    print(f"  {time:8.1f}  {name[:140]}")


def profile_operator() -> None:
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

    for normalizer in ("mean", "max"):
        pairs = zip(both(8, normalizer), both(8, normalizer, "eager"), strict=True)
        print(normalizer, "beside the PyTorch path:", *(f"{distance(*pair):.4f}" for pair in pairs))
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


def main() -> None:
    parts = {"operator": profile_operator, "norms": profile_norms, "blocks": profile_blocks}
    (part,) = sys.argv[1:] or ["operator"]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    parts[part]()


if __name__ == "__main__":
    main()
