"""The Triton kernels, run by Triton's interpreter on the CPU, against Eq. 5 in float64.

The interpreter is chosen when Triton is imported, so the tests below the line run in a process of their own.
"""

import copy
import dataclasses
import functools
import logging
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from micro_wan import micro_transformer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.testing._internal.two_tensor import TwoTensor

import attention_surgery as asg
from attention_surgery.errors import ConfigError, TensorError
from attention_surgery.layers import processor as processor_module
from attention_surgery.layers import projections
from attention_surgery.layers.processor import HybridAttnProcessor
from attention_surgery.models import hybrid_processors
from attention_surgery.ops import eager, hybrid, naive
from attention_surgery.ops.triton import support

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_kernels_in_the_interpreter(which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", which, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")

# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers: it multiplies those, and cuts float32 off instead of rounding."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def round_to_nearest_even(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(data, source, target, mode)
        bits = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)

    def widen(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def dot(self, a, b, d, *_):
        product = np.matmul(widen(a), widen(b), dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(product, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", round_to_nearest_even)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Within, what `torch.empty` returns is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n, *, b=1, h=2, d=32, degree=2, dtype=torch.float32, q_scale=1.0, seed=0):
    """q, k, v, a gradient of y, and two feature maps whose biases are not zero."""
    torch.manual_seed(seed)
    q, k, v, dy = (torch.randn(b, n, h, d).to(dtype) for _ in range(4))
    phis = [asg.FeatureMap(h, d, degree=degree) for _ in range(2)]
    with torch.no_grad():
        for phi in phis:
            for bias in phi.biases:
                bias.normal_(0.0, 0.5)
    return (q * q_scale).to(dtype), k, v, dy, phis


def run(op, dtype, q, k, v, dy, phis, **options):
    """Output, and every gradient, in `dtype`."""
    maps = [copy.deepcopy(phi) for phi in phis]
    if dtype == torch.float64:
        maps = [phi.double() for phi in maps]
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
    y = op(*leaves, *maps, **options)
    y.backward(dy.to(dtype))
    named = {"y": y.detach()} | {name: x.grad for name, x in zip("qkv", leaves, strict=True)}
    return named | {
        f"{side}.{name}": p.grad for side, m in zip("qk", maps, strict=True) for name, p in m.named_parameters()
    }


def assert_as_accurate_as_eager(case, **options) -> None:
    """Error against the float64 oracle at most 2× (gradients 3×) that of the PyTorch path in the same dtype."""
    dtype = case[0].dtype
    oracle = run(naive.hybrid_attention, torch.float64, *case, **options)
    plain = run(asg.hybrid_attention, dtype, *case, backend="eager", **options)
    fused = run(asg.hybrid_attention, dtype, *case, backend="triton", **options)
    for name, expected in oracle.items():
        got = fused[name]
        assert got.shape == expected.shape and torch.isfinite(got).all(), name
        honest = (plain[name].double() - expected).norm()
        slack = torch.finfo(torch.float32).eps * expected.norm()
        bound = (2 if name == "y" else 3) * honest + slack
        error = (got.double() - expected).norm()
        assert error <= bound, f"{name}: error {error:.3e}, PyTorch's {honest:.3e}"


@interpreted
@pytest.mark.parametrize("normalizer", ["mean", "max"])
@pytest.mark.parametrize(
    ("n", "rate", "shape"),
    [
        (37, 4, {}),
        (33, 2, {"b": 2}),
        (40, 8, {"d": 64, "h": 1}),
        (9, 4, {"d": 128, "h": 1}),
        (7, 16, {}),  # fewer tokens than the rate
        (2, 2, {"h": 3}),
        (19, 3, {"degree": 1}),
        (17, 4, {"degree": 3, "h": 1}),
    ],
)
def test_output_and_gradients(n, rate, shape, normalizer, poisoned) -> None:
    assert_as_accurate_as_eager(inputs(n, **shape), rate=rate, normalizer=normalizer)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalizer", ["mean", "max"])
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize(("n", "b", "rate"), [(35, 2, 2), (50, 1, 3), (41, 1, 8), (5, 1, 32), (18, 1, "linear")])
@pytest.mark.parametrize("pattern", ["stride", "staggered", "lattice"])
def test_every_combination(n, b, rate, d, degree, normalizer, dtype, pattern, poisoned) -> None:
    if rate == "linear" and (normalizer, pattern) != ("mean", "stride"):
        pytest.skip("linear attention has neither normalizer nor pattern")
    grid = {35: (5, 7, 1), 50: (2, 5, 5), 41: (1, 1, 41), 5: (1, 5, 1)}.get(n) if pattern == "lattice" else None
    case = inputs(n, b=b, d=d, degree=degree, dtype=dtype)
    assert_as_accurate_as_eager(case, rate=rate, normalizer=normalizer, pattern=pattern, grid=grid)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_half_precision(dtype, normalizer, poisoned) -> None:
    assert_as_accurate_as_eager(inputs(35, dtype=dtype), rate=4, normalizer=normalizer)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_attention(dtype, poisoned) -> None:
    assert_as_accurate_as_eager(inputs(23, dtype=dtype), rate="linear")


@interpreted
@pytest.mark.parametrize("normalizer", ["mean", "max"])
@pytest.mark.parametrize(("pattern", "grid"), [("staggered", None), ("lattice", (2, 3, 5))])
def test_sets_that_are_no_stride(pattern, grid, normalizer, poisoned) -> None:
    assert_as_accurate_as_eager(inputs(30, h=3), rate=4, normalizer=normalizer, pattern=pattern, grid=grid)


@pytest.fixture
def pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles move as they do before Hopper, without tensor descriptors."""
    from attention_surgery.ops.triton.plan import Plan

    monkeypatch.setattr(Plan, "copy_engine", property(lambda _: False))


@interpreted
@pytest.mark.parametrize(
    ("normalizer", "pattern", "rate"), [("mean", "stride", "linear"), ("mean", "stride", 3), ("max", "staggered", 4)]
)
def test_without_tensor_descriptors(normalizer, pattern, rate, pointers, poisoned) -> None:
    assert_as_accurate_as_eager(inputs(19, b=2), rate=rate, normalizer=normalizer, pattern=pattern)


@interpreted
@pytest.mark.parametrize("degree", [2, 3])
def test_weights_that_stay_in_shared_memory(degree, monkeypatch, poisoned) -> None:
    from attention_surgery.ops.triton import blocks, forward
    from attention_surgery.ops.triton.plan import Map

    _, k, v, _, (phi, _) = inputs(21, degree=degree)
    arguments = (k, v, Map(*phi.weights[:1], *phi.biases[:1], *phi.weights[1:], *phi.biases[1:]), None, 4)
    streamed = forward.linear_state(*arguments)
    monkeypatch.setattr(blocks, "INTERPRETED", dataclasses.replace(blocks.INTERPRETED, resident=True))
    for got, expected in zip(forward.linear_state(*arguments), streamed, strict=True):
        assert torch.equal(got, expected)


@interpreted
@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_logits_of_eighty(normalizer, poisoned) -> None:
    q, k, v, dy, phis = inputs(24, q_scale=32.0)
    logits = torch.einsum("bihd,bjhd->bhij", q, k[:, ::4]) / math.sqrt(q.shape[-1])
    assert logits.max() > 80 and logits.min() < -80
    assert_as_accurate_as_eager((q, k, v, dy, phis), rate=4, normalizer=normalizer)


@interpreted
@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_layouts(normalizer) -> None:
    """Fused projections, heads before tokens, channels apart, an odd address, overlaps: as contiguous tensors."""
    q, k, v, dy, phis = inputs(20)
    dy = dy[:, :1].expand_as(dy)
    expected = gradients({"q": q, "k": k, "v": v}, dy.contiguous(), phis, rate=4, normalizer=normalizer)
    layouts = {
        "fused": torch.cat([q, k, v], dim=-1).tensor_split(3, dim=-1),
        "swapped": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "apart": [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)],
        "odd": [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)],
    }
    for name, layout in layouts.items():
        tensors = dict(zip("qkv", layout, strict=True))
        if name == "fused":
            results = gradients(tensors, dy, phis, rate=4, normalizer=normalizer)
        else:
            results = [asg.hybrid_attention(*layout, *phis, rate=4, normalizer=normalizer, backend="triton")]
        for got, wanted in zip(results, expected, strict=False):
            if normalizer == "max":
                assert torch.equal(got, wanted), name
            else:  # PyTorch's attention sums in an order that depends on the layout
                torch.testing.assert_close(got, wanted, msg=name)


@interpreted
@pytest.mark.parametrize("engine", ["descriptors", "pointers"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_beyond_32_bits(axis, engine, request) -> None:
    """Batch entries, tokens or heads so far apart that an address needs 64 bits. (What lies between is not touched.)"""
    if engine == "pointers":
        request.getfixturevalue("pointers")
    n = 5
    q, k, v, dy, phis = inputs(n, b=2, h=2, dtype=torch.float16)
    distance = 2**31 // (q.shape[axis] - 1)
    strides = [n * 64, 64, 32, 1]
    strides[axis] = distance
    room = torch.empty(2**31 + 2 * n * 64, dtype=torch.float16)
    options = {"rate": 2, "normalizer": "max"}
    for name in "qkv":
        tensors = {"q": q, "k": k, "v": v}
        with torch.no_grad():
            expected = asg.hybrid_attention(*tensors.values(), *phis, backend="triton", **options)
        tensors[name] = room.as_strided(q.shape, strides).copy_(tensors[name])
        with torch.no_grad():
            assert torch.equal(asg.hybrid_attention(*tensors.values(), *phis, backend="triton", **options), expected), (
                name
            )
    if axis == 0:
        tensors = {"q": q, "k": k, "v": v}
        expected = gradients(tensors, dy, phis, **options)
        tensors["k"] = room.as_strided(q.shape, strides).copy_(k)
        for got, wanted in zip(gradients(tensors, dy, phis, **options), expected, strict=True):
            assert torch.equal(got, wanted)


class LastProgram:
    """Stands in for a kernel: of all the programs of a launch, runs the last one."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        from triton.runtime.interpreter import interpreter_builder as builder

        grid = (*grid, 1, 1)[:3]

        def launch(**arguments) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", grid))
                patch.setattr(
                    builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", tuple(size - 1 for size in grid))
                )
                self.kernel[(1, 1, 1)](**arguments)

        return launch


@interpreted
def test_tensors_of_more_than_2_to_the_31_elements(monkeypatch, pointers) -> None:
    """The last tile of the last head, computed within tensors of 4 GiB and on its own. (The rest is not touched.)"""
    from attention_surgery.ops.triton import backward, forward
    from attention_surgery.ops.triton.plan import Map

    n, h, d, last = 2**20 + 3, 64, 32, 3
    torch.manual_seed(0)
    phi = asg.FeatureMap(h, d).requires_grad_(False)
    (w1, w2), (b1, b2) = phi.weights, phi.biases
    whole, part = Map(w1, b1, w2, b2), Map(w1[-1:], b1[-1:], w2[-1:], b2[-1:])
    state, mass = torch.rand(1, h, 2 * d, d), torch.rand(1, h, 2 * d)
    k, v = (torch.randn(1, 6, h, d, dtype=torch.float16) for _ in range(2))
    q, o = (torch.empty(1, n, h, d, dtype=torch.float16) for _ in range(2))
    assert q.numel() > 2**31
    for x in (q, o):
        x[0, -last:, -1] = torch.randn(last, d)
    little = {"q": q[:, -last:, -1:].clone(), "o": o[:, -last:, -1:].clone(), "k": k[:, :, -1:], "v": v[:, :, -1:]}

    def both(launch, name, *arguments):
        """`launch` on the whole, its kernel `name` reduced to the last program, and on that program's part."""
        on_part = launch(*(little[x] if isinstance(x, str) else x[1] for x in arguments))
        with pytest.MonkeyPatch.context() as patch:
            module = sys.modules[launch.__module__]
            patch.setattr(module, name, LastProgram(getattr(module, name)))
            if launch is backward.attend_gradients:
                patch.setattr(module, "key_gradient_kernel", {(1, h): lambda **_: None})
            tensors = {"q": q, "o": o, "k": k, "v": v}
            on_whole = launch(*(tensors[x] if isinstance(x, str) else x[0] for x in arguments))
        return zip(on_whole, on_part, strict=True)

    states = (state, state[:, -1:]), (mass, mass[:, -1:]), (whole, part), (0.1, 0.1)
    for got, expected in both(forward.merge, "merge_kernel", "q", "o", *states):
        got = got[:, -last:, -1:] if got.ndim == 4 else got[:, -1:, -last:]
        assert torch.equal(got, expected)
    for got, expected in both(forward.attend, "attend_kernel", "q", "k", "v"):
        got = got[:, -last:, -1:] if got.ndim == 4 else got[:, -1:, -last:]
        assert torch.equal(got, expected)
    rows = torch.empty(1, h, n)
    rows[0, -1, -last:] = torch.rand(last)
    vector = (rows, rows[:, -1:, -last:].clone())
    gradients = both(backward.attend_gradients, "query_gradient_kernel", "q", "k", "v", "o", vector, vector, "o")
    got, expected = next(iter(gradients))
    assert torch.equal(got[:, -last:, -1:], expected)


def gradients(tensors, dy, phis, **options):
    """Output and every gradient of the kernels."""
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    y = asg.hybrid_attention(*leaves, *phis, backend="triton", **options)
    return [y, *torch.autograd.grad(y, [*leaves, *phis[0].parameters(), *phis[1].parameters()], dy)]


@interpreted
def test_gradients_that_nobody_wants_are_left_out() -> None:
    q, k, v, dy, phis = inputs(20)
    for phi in phis:
        phi.requires_grad_(False)
    frozen = run(asg.hybrid_attention, torch.float32, q, k, v, dy, phis, rate=4, normalizer="max", backend="triton")
    for phi in phis:
        phi.requires_grad_(True)
    full = run(asg.hybrid_attention, torch.float32, q, k, v, dy, phis, rate=4, normalizer="max", backend="triton")
    assert all(torch.equal(frozen[name], full[name]) for name in "yqkv")
    assert {name for name, x in frozen.items() if x is None} == set(full) - set("yqkv")
    y = asg.hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean", backend="triton")
    y.backward(dy)
    assert all(p.grad is not None for phi in phis for p in phi.parameters())


@interpreted
def test_second_derivatives_are_refused() -> None:
    q, k, v, dy, phis = inputs(12)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = asg.hybrid_attention(*leaves, *phis, rate=4, normalizer="mean", backend="triton")
    slopes = torch.autograd.grad(y, leaves, dy, create_graph=True)
    with pytest.raises(NotImplementedError, match="the kernels of hybrid attention are differentiable once"):
        torch.autograd.grad(sum(slope.sum() for slope in slopes), leaves)


@interpreted
@pytest.mark.parametrize(("heads_per_round", "expected"), [(1, [1] * 10), (3, [3, 3, 3, 1]), (6, [5, 5])])
def test_rounds_change_nothing(heads_per_round, expected, monkeypatch, poisoned) -> None:
    from attention_surgery.ops.triton import backward

    case = inputs(14, b=2, h=5)
    options = {"rate": 4, "normalizer": "mean", "backend": "triton"}
    whole = run(asg.hybrid_attention, torch.float32, *case, **options)
    launched = []
    kernel = backward.map_gradient_kernel
    watched = {"__getitem__": lambda _, grid: launched.append(grid[1]) or kernel[grid]}
    monkeypatch.setattr(backward, "map_gradient_kernel", type("Watched", (), watched)())
    monkeypatch.setattr(backward, "WORKSPACE_BYTES", heads_per_round * 4 * 16 * 64 * 4)
    monkeypatch.setattr(backward, "WORKSPACE_TENSORS", 0)
    rounds = run(asg.hybrid_attention, torch.float32, *case, **options)
    assert launched == 2 * expected
    assert all(torch.allclose(rounds[name], whole[name], rtol=1e-5, atol=1e-6) for name in whole)


@interpreted
def test_shares_of_the_tokens_add_up(monkeypatch, poisoned) -> None:
    """Sums over the tokens, split among more programs than two multiprocessors ask for."""
    from attention_surgery.ops.triton import plan

    case = inputs(150, b=2, h=2)
    options = {"rate": 4, "normalizer": "mean", "backend": "triton"}
    whole = run(asg.hybrid_attention, torch.float32, *case, **options)
    split = []
    shares = plan.Plan.shares
    monkeypatch.setattr(plan.Plan, "shares", lambda *arguments: split.append(shares(*arguments)) or split[-1])
    monkeypatch.setattr(plan, "PROCESSORS", 400)
    shared = run(asg.hybrid_attention, torch.float32, *case, **options)
    assert len(split) == 3 and all(count > 3 for count, _ in split)
    assert all(torch.allclose(shared[name], whole[name], rtol=1e-5, atol=1e-6) for name in whole)


@interpreted
@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_compiles_in_one_graph(normalizer) -> None:
    q, k, v, dy, phis = inputs(18)

    def op(q, k, v):
        return asg.hybrid_attention(q, k, v, *phis, rate=4, normalizer=normalizer, backend="triton")

    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = op(*leaves)
    expected_grads = torch.autograd.grad(expected, [*leaves, *phis[0].parameters()], dy)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(*leaves)
    grads = torch.autograd.grad(compiled, [*leaves, *phis[0].parameters()], dy)
    assert torch.equal(compiled, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def kept_for_the_backward(op, leaves) -> tuple[torch.Tensor, int]:
    """The result of `op`, and the bytes of all that is kept for its backward, each storage once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is not None and x, lambda x: x
    ):
        y = op(*leaves)
    return y, sum(x.untyped_storage().nbytes() for x in kept.values())


@interpreted
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiler", [None, "aot_eager_decomp_partition"])
def test_input_of_the_output_projection_is_computed_again(compiler, bias) -> None:
    """The same output and gradients, without the merged tokens and their denominators for the backward."""
    q, k, v, dy, phis = inputs(30, b=2)
    b, n, h, d = q.shape
    projection = torch.nn.Linear(h * d, 24, bias=bias)
    dout = dy.flatten(2) @ torch.randn(h * d, 24)
    options = {"rate": 4, "normalizer": "mean", "backend": "triton"}

    def behind(q, k, v):  # each behind a product, so that neither is an input that lives anyway
        return projection(asg.hybrid_attention(1.5 * q, 1.5 * k, 1.5 * v, *phis, **options).flatten(2))

    def within(q, k, v):
        return asg.hybrid_attention(1.5 * q, 1.5 * k, 1.5 * v, *phis, projection=projection, **options)

    results = []
    for op in (behind, within):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        trained = [*leaves, *phis[0].parameters(), *phis[1].parameters(), *projection.parameters()]
        out, kept = kept_for_the_backward(
            torch.compile(op, fullgraph=True, backend=compiler) if compiler else op, leaves
        )
        results.append(([out, *torch.autograd.grad(out, trained, dout)], kept))
    (expected, kept_behind), (found, kept_within) = results
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert kept_behind - kept_within == 4 * (b * n * h * d + b * h * n)


@interpreted
@pytest.mark.parametrize(
    ("rate", "normalizer", "pattern", "compiler"),
    [
        (4, "mean", "stride", None),
        (4, "mean", "stride", "aot_eager_decomp_partition"),
        (3, "max", "stride", None),
        (4, "mean", "staggered", None),
        ("linear", "mean", "stride", None),
    ],
)
def test_keys_are_made_again(rate, normalizer, pattern, compiler) -> None:
    """The same output and gradients; of k after QK-norm and RoPE only the softmax tokens are kept for the backward."""
    from attention_surgery.ops.triton import functions

    q, x, v, dy, phis = inputs(11, h=1)
    b, n, h, d = q.shape
    weight, other = torch.randn(2, h * d)
    cos, sin = torch.randn(2, n, d // 2).repeat_interleave(2, 2)
    options = {"rate": rate, "normalizer": normalizer, "pattern": pattern, "backend": "triton"}

    def run(q, x, v, weight, other, *, again):
        q, x = 1.5 * q.flatten(2), 1.5 * x.flatten(2)  # products, so that none is an input that lives anyway
        source = hybrid.KeySource(x, weight, cos, sin, 0.1) if again else None
        q, k = functions.Rotated.apply(q, x, other, weight, cos, sin, 0.2, 0.1)
        return asg.hybrid_attention(q, k, 1.5 * v, *phis, **options, key_source=source)

    results = []
    for again in (False, True):
        leaves = [each.clone().requires_grad_() for each in (q, x, v, weight, other)]
        op = functools.partial(run, again=again)
        y, kept = kept_for_the_backward(torch.compile(op, fullgraph=True, backend=compiler) if compiler else op, leaves)
        trained = [*leaves, *phis[0].parameters(), *phis[1].parameters()]
        results.append(([y, *torch.autograd.grad(y, trained, dy)], kept))
    (expected, kept_whole), (found, kept_again) = results
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
    copied = -(-n // rate) if pattern == "stride" and rate != "linear" else 0  # gathered tokens are a copy anyway
    assert kept_whole - kept_again == 4 * b * h * d * (n - copied)


@interpreted
def test_a_layer_makes_its_keys_again(monkeypatch) -> None:
    """For a backward; without one their source is not held, nor a softmax token copied."""
    torch.manual_seed(0)
    n, heads, d, rate = 9, 2, 32, 4
    attn = WanAttention(heads * d, heads, d, processor=HybridAttnProcessor(heads, d, rate=rate))
    attn.fused_projections, attn.processor.backend = False, "triton"
    hidden, rotary = rotary_inputs(attn, n=n)
    hidden.requires_grad_()
    _, again = kept_for_the_backward(lambda x: attn(x, rotary_emb=rotary), [hidden])
    views = []
    with torch.no_grad(), monkeypatch.context() as patch:
        attend = eager.softmax_attention
        patch.setattr(
            eager, "softmax_attention", lambda q, k, v, *how: views.append(k._is_view()) or attend(q, k, v, *how)
        )
        attn(hidden, rotary_emb=rotary)
        assert views == [True] and projections.project_qkv(attn, hidden, rotary, "triton")[3] is None
    project = processor_module.project_qkv
    monkeypatch.setattr(processor_module, "project_qkv", lambda *args: (*project(*args)[:3], None))
    _, whole = kept_for_the_backward(lambda x: attn(x, rotary_emb=rotary), [hidden])
    assert whole - again == 4 * heads * d * (n - math.ceil(n / rate))


@interpreted
def test_a_source_of_keys_that_does_not_fit_is_named() -> None:
    q, k, v, _, phis = inputs(12)
    (_, n, h, d), flat = k.shape, k.flatten(2)
    weight, cos = torch.randn(h * d), torch.randn(n, d)
    whole = hybrid.KeySource(flat, weight, cos, cos, 1e-6)
    for field, wrong, message in (
        ("k", k, r"k of key_source is \(1, 12, 2, 32\) on cpu; expected \(1, 12, 64\) on cpu"),
        ("k", flat.double(), "k of key_source is torch.float64; expected torch.float32, as k"),
        ("weight", weight[1:], r"weight of key_source is \(63,\) on cpu; expected \(64,\)"),
        ("cos", cos[1:], r"cos of key_source is \(11, 32\) on cpu; expected \(12, 32\)"),
        ("sin", cos.to("meta"), r"sin of key_source is \(12, 32\) on meta; expected \(12, 32\) on cpu"),
    ):
        with pytest.raises(TensorError, match=message):
            asg.hybrid_attention(q, k, v, *phis, rate=4, key_source=whole._replace(**{field: wrong}))


@interpreted
def test_projections_that_are_more_than_two_parameters_are_called() -> None:
    """Hooks, adapters and another `forward` see the merged tokens; a frozen weight and half precision do not matter."""
    from attention_surgery.ops.triton import path

    class Adapter(torch.nn.Linear):
        pass

    q, k, v, _, phis = inputs(12)
    q.requires_grad_()
    width = q.shape[2] * q.shape[3]
    hooked, replaced = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
    seen = []
    hooked.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    replaced.forward = lambda x: seen.append(x.shape) or x
    quantized = torch.nn.Linear(width, width)
    quantized.weight = torch.nn.Parameter(TwoTensor(quantized.weight.detach(), quantized.weight.detach().clone()))
    wrapped = torch.nn.Linear(width, width)
    options = {"rate": 4, "normalizer": "mean", "backend": "triton", "projection": wrapped}
    compiled = torch.compile(lambda q: asg.hybrid_attention(q, k, v, *phis, **options), fullgraph=True, backend="eager")
    compiled(q)
    wrapped.forward = functools.partial(lambda x: seen.append("wrapped after compilation") or x)
    compiled(q)
    assert seen == ["wrapped after compilation"]
    seen.clear()
    for projection in (hooked, replaced, quantized, Adapter(width, width)):
        assert not path.merges_again(q, 4, "mean", projection)
        asg.hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean", backend="triton", projection=projection)
    assert seen == [(1, 12, width)] * 2
    replaced.forward = types.MethodType(torch.nn.Linear.forward, replaced)  # as hooks that are removed leave it
    assert path.merges_again(q, 4, "mean", replaced)
    plain = torch.nn.Linear(width, width).requires_grad_(False)
    assert path.merges_again(q, 4, "mean", plain)
    with register_module_forward_hook(lambda module, args, out: seen.append(args[0].shape)):
        assert not path.merges_again(q, 4, "mean", plain)
    plain.bias.data = plain.bias.double()
    assert not path.merges_again(q, 4, "mean", plain)
    assert not path.merges_again(q, 4, "mean", plain.bfloat16())
    assert not any(path.merges_again(q, *how, plain.float()) for how in ((1, "mean"), ("linear", "mean"), (4, "max")))
    with torch.no_grad():
        assert not path.merges_again(q, 4, "mean", plain.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert not path.merges_again(q, 4, "mean", plain.float())
        q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
        assert path.merges_again(q, 4, "mean", plain.float())
        out = asg.hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean", backend="triton", projection=plain)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and plain.weight.grad is None and q.grad.isfinite().all()


def rotary_inputs(attn, *, b=1, n=7, dtype=torch.float32):
    """Hidden states, and RoPE's cosines and sines, for an attention layer, whose norms get weights far from one."""
    with torch.no_grad():
        for norm in (attn.norm_q, attn.norm_k):
            norm.weight.normal_()
    angles = torch.randn(n, attn.inner_dim // attn.heads // 2).repeat_interleave(2, 1)[None, :, None]
    return torch.randn(b, n, attn.inner_dim, dtype=dtype), (angles.cos(), angles.sin())


@interpreted
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 32), (3, 24), (5, 128)])
def test_norms_and_rotation_are_those_of_diffusers(heads, head_dim, fused) -> None:
    """q, k and v, k made again, and the gradients of all that they are made of."""
    from attention_surgery.ops.triton import operators

    torch.manual_seed(0)
    attn = WanAttention(heads * head_dim, heads, head_dim, processor=WanAttnProcessor())
    attn.fused_projections = False
    if fused:
        attn.fuse_projections()
    attn.norm_k.eps = 0.3
    hidden, rotary = rotary_inputs(attn, b=2)
    trained = [hidden.requires_grad_(), *(p for p in attn.parameters() if p.requires_grad)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projections, "kernel_lacks", lambda *_: pytest.fail("not the PyTorch path"))
        *expected, no_source = projections.project_qkv(attn, hidden, rotary, "eager")
    *found, source = projections.project_qkv(attn, hidden, rotary, "triton")
    again = operators.rotary_again(hidden, *source)
    assert no_source is None and torch.equal(again, found[1])
    assert "Rotated" in type(found[0].grad_fn).__name__ and "Rotated" not in type(expected[0].grad_fn).__name__
    grads = [torch.randn_like(x) for x in expected]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    of = [torch.autograd.grad(x, trained, grads, allow_unused=True) for x in (found, expected)]
    for got, wanted in zip(*of, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@interpreted
def test_norms_and_rotation_take_every_layout() -> None:
    """q, k, weights and tables with strides of their own, channels apart, one sample for all, gradients likewise."""
    from attention_surgery.ops.triton import functions

    torch.manual_seed(0)
    b, n, h, d = 3, 11, 5, 12
    of_q, of_k = torch.randn(2 * h * d)[::2].requires_grad_(), torch.randn(h * d).requires_grad_()
    cos, sin = torch.randn(n, 3 * d)[:, :d], torch.randn(n, d, 2)[:, :, 1]
    cos[:, 1::2], sin[:, 1::2] = cos[:, ::2].clone(), sin[:, ::2].clone()
    k = torch.randn(n, b, h * d).transpose(0, 1).requires_grad_()
    grads = torch.randn(b, h, n, d).transpose(1, 2), torch.randn(1, n, 1, d).expand(b, n, h, d)

    def stock(x, weight, eps):
        y = torch.nn.functional.rms_norm(x, (h * d,), weight, eps).unflatten(2, (h, d))
        return projections.rotate(y, cos[None, :, None], sin[None, :, None])

    for q in (
        torch.randn(b, n, 2 * h * d)[..., h * d :],
        torch.randn(b, h * d, n).transpose(1, 2),
        torch.randn(1, n, h * d).expand(b, n, h * d),
    ):
        leaves = [q.requires_grad_(), k, of_q, of_k]
        found = functions.Rotated.apply(*leaves, cos, sin, 1e-3, 0.2)
        expected = stock(q, of_q, 1e-3), stock(k, of_k, 0.2)
        slopes = [torch.autograd.grad(y, leaves, grads) for y in (found, expected)]
        for got, wanted in (*zip(found, expected, strict=True), *zip(*slopes, strict=True)):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@interpreted
def test_norms_and_rotation_are_differentiable_once() -> None:
    """And say so: neither a second derivative nor one in forward mode is zero without a word."""
    torch.manual_seed(0)
    attn = WanAttention(64, 2, 32, processor=WanAttnProcessor()).requires_grad_(False)
    attn.fused_projections = False
    hidden, rotary = rotary_inputs(attn)

    def run(x):
        return projections.project_qkv(attn, x, rotary, "triton")[0]

    with pytest.raises(RuntimeError, match=r"jvp|forward"), forward_ad.dual_level():
        run(forward_ad.make_dual(hidden, torch.ones_like(hidden)))
    hidden.requires_grad_()
    (slope,) = torch.autograd.grad(run(hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(slope.sum(), hidden)


@interpreted
@pytest.mark.parametrize("autocast", [False, True])
def test_norms_and_rotation_in_half_precision(autocast) -> None:
    """In the dtype that the rest of the layer has, and no further from float64 than the modules themselves."""
    torch.manual_seed(0)
    attn = WanAttention(64, 2, 32, processor=WanAttnProcessor())
    attn.fused_projections = False
    hidden, rotary = rotary_inputs(attn, dtype=torch.float32 if autocast else torch.bfloat16)
    if not autocast:
        attn.bfloat16()
    exact = copy.deepcopy(attn).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, stock = (projections.project_qkv(attn, hidden, rotary, backend)[:3] for backend in ("triton", "eager"))
    assert "Rotated" in type(ours[0].grad_fn).__name__
    exactly = projections.project_qkv(exact, hidden.double(), rotary)[:3]
    for got, theirs, wanted in zip(ours, stock, exactly, strict=True):
        assert got.dtype == theirs.dtype == torch.bfloat16
        assert (got - wanted).norm() <= 1.05 * (theirs - wanted).norm()


@interpreted
def test_what_the_kernel_for_norms_lacks_is_named_and_the_modules_are_called(caplog) -> None:
    torch.manual_seed(0)
    attn = WanAttention(64, 2, 32, processor=WanAttnProcessor())
    attn.fused_projections = False
    hidden, rotary = rotary_inputs(attn)
    q = attn.to_q(hidden)
    cos, sin = rotary
    seen = []

    def lacks(*, q=q, k=None, v=None, rotary=rotary) -> str:
        value = (q if v is None else v).unflatten(2, (2, -1))
        return projections.kernel_lacks(attn, q, q if k is None else k, value, rotary) or ""

    assert not lacks()
    assert "no RoPE" in lacks(rotary=None)
    for other in ({"q": q.double()}, {"k": q.bfloat16()}, {"v": q.bfloat16()}):
        assert "q, k and v are" in lacks(**other), other
    assert "k is (1, 6, 64); expected (1, 7, 64), as q" in lacks(k=q[:, 1:])
    assert "norm_q is of shape (64,) and torch.float32; q has 64, torch.bfloat16" in lacks(q=q.bfloat16())
    assert "expected h·d up to" in lacks(q=q[:1, :1].expand(2**16, 1, 64))
    assert "expected h·d up to" in lacks(q=torch.randn(1, 1, 2 * projections.MAX_CHANNELS))
    assert "expected h·d up to" in lacks(q=torch.randn(1, 7, 62))  # 31 channels a head
    assert "cos of RoPE is (1, 6, 1, 32)" in lacks(rotary=(cos[:, 1:], sin))
    assert "sin of RoPE" in lacks(rotary=(cos, sin.clone().requires_grad_()))
    assert "not all plain tensors on cpu" in lacks(rotary=(cos, sin.to("meta")))
    assert "not all plain tensors" in lacks(rotary=(cos, TwoTensor(sin, sin.clone())))
    plain = attn.norm_q
    for norm in (
        torch.nn.LayerNorm(64),
        torch.nn.RMSNorm(64, eps=1e-6, elementwise_affine=False),
        torch.nn.RMSNorm(64),  # whose ε depends on how PyTorch computes it
    ):
        attn.norm_q = norm
        assert "norm_q is more than" in lacks(), norm
    attn.norm_q = torch.nn.RMSNorm(32, eps=1e-6)
    assert "norm_q is of shape (32,)" in lacks()
    attn.norm_q = plain
    hook = attn.norm_k.register_forward_hook(lambda module, args, out: seen.append(module))
    hybrid._log_reason.cache_clear()
    for _ in range(2):
        projections.project_qkv(attn, hidden, rotary, "triton")
    assert seen == [attn.norm_k] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "QK-norm with RoPE takes the PyTorch path: norm_k is more than an nn.RMSNorm with a weight and an eps"
    ]
    hook.remove()
    assert not lacks()
    unrotated = projections.project_qkv(attn, hidden, None, "triton")
    assert torch.equal(unrotated[0], plain(q).unflatten(2, (2, 32)))


def converted():
    """A small transformer with two hybrid layers, and what to call it with; nothing of it is compiled yet."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = micro_transformer(attention_head_dim=32, ffn_dim=64, num_layers=2)
    asg.convert_(model, asg.HybridConfig(rates={0: 4, 1: 2}, normalizer="mean"))
    sizes = {"hidden_states": (1, 4, 3, 8, 8), "encoder_hidden_states": (1, 5, 16)}
    return model, {name: torch.randn(size) for name, size in sizes.items()} | {"timestep": torch.tensor([500])}


@interpreted
def test_a_converted_model_trains_on_the_kernels() -> None:
    """Output and gradients of PyTorch's path: as it is, with gradient checkpointing, and with compiled blocks."""
    model, arguments = converted()

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        y = model(**arguments).sample
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = step()
    for processor in hybrid_processors(model).values():
        processor.backend = "triton"
    results = {"plain": step()}
    model.enable_gradient_checkpointing()
    results["checkpointed"] = step()
    model.disable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    results["compiled"] = step()
    for name, found in results.items():
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6, msg=name)


@interpreted
def test_a_converted_model_trains_on_the_kernels_under_autocast() -> None:
    """As fine-tuning does: float32 weights, bfloat16 products. Gradients are as near to float32's as PyTorch's path."""
    stock, arguments = converted()

    def step(*, autocast=True, backend="eager", compiled=False) -> list[torch.Tensor]:
        model = copy.deepcopy(stock)
        for processor in hybrid_processors(model).values():
            processor.backend = backend
        model.enable_gradient_checkpointing()
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(**arguments).sample
        y.float().square().mean().backward()
        return [y.detach().float(), *(p.grad for p in model.parameters() if p.grad is not None)]

    exact = step(autocast=False)

    def errors(found: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(got - true).norm() / true.norm() for got, true in zip(found, exact, strict=True)])

    allowed = errors(step())
    for compiled in (False, True):
        error = errors(step(backend="triton", compiled=compiled))
        assert error.mean() <= 1.2 * allowed.mean() and error.max() <= 2 * allowed.max()


@interpreted
def test_operators_keep_pytorchs_contract() -> None:
    """Schemas, fake implementations and autograd registrations agree with what the operators do."""
    from attention_surgery.ops.triton import operators

    q, k, v, _, (phi, _) = inputs(12, h=1)
    parameters = [p.detach() for layer in zip(phi.weights, phi.biases, strict=True) for p in layer]
    state, mass = operators.linear_state(k, v, *parameters, None, 4)
    grad = [x.requires_grad_() for x in (q, k, v, state, mass, *parameters)]
    q, k, v, state, mass, *parameters = grad
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    fakes = ("test_schema", "test_faketensor")
    opcheck = torch.library.opcheck
    rotary = (q.flatten(2), k.flatten(2), *torch.randn(2, 32), torch.randn(12, 32), torch.randn(12, 32), 1e-6, 1e-6)
    opcheck(operators.linear_state, (k, v, *parameters, None, 4), test_utils=checks)
    opcheck(operators.merge, (q, v, state, mass, *parameters, 0.1), test_utils=checks)
    opcheck(operators.attend, (q, k[:, ::4], v[:, ::4], state, mass, *parameters, 0.1), test_utils=checks)
    with torch.no_grad():
        y, denominator, top = operators.attend(q, k[:, ::4], v[:, ::4], state, mass, *parameters, 0.1)
        softmax = k[:, ::4].clone(), v[:, ::4].clone()
        arguments = (state, mass, *softmax, k, v, *parameters, None, 4, True)
        opcheck(operators.linear_state_backward, arguments, test_utils=fakes)
        opcheck(operators.rotary, rotary, test_utils=fakes)
        opcheck(operators.rotary_backward, (q, k, *rotary), test_utils=fakes)
        opcheck(operators.rotary_again, (state, *rotary[1:2], *rotary[3:6], 1e-6), test_utils=fakes)
        opcheck(operators.merge_again, (y, q, v, state, mass, *parameters, 0.1), test_utils=fakes)
        opcheck(operators.output_gradient, (v, y, denominator), test_utils=fakes)
        for soft in (None, v):
            arguments = (v, denominator, soft, q, state, mass, *parameters, 0.1, False)
            opcheck(operators.merge_backward, arguments, test_utils=fakes)
        opcheck(operators.attend_backward, (q, k[:, ::4], v[:, ::4], y, top, top, q), test_utils=fakes)


@interpreted
@pytest.mark.parametrize("rate", [4, "linear"])
@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_flops_are_those_of_the_products(rate, normalizer) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    n, h, d, f = 32, 2, 32, 64
    q, k, v, _, phis = inputs(n)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        asg.hybrid_attention(q, k, v, *phis, rate=rate, normalizer=normalizer, backend="triton")
    soft = 0 if rate == "linear" else n // rate
    per_token = d * f + f * f + f * d
    expected = 2 * h * (2 * n * soft * d + (2 * n - soft) * per_token)
    if normalizer == "mean":  # scaled_dot_product_attention counts nothing on the CPU
        expected -= 2 * h * 2 * n * soft * d
    assert counter.get_total_flops() == expected


@interpreted
def test_results_repeat_bit_for_bit() -> None:
    case = inputs(18, h=2)
    options = {"rate": 4, "normalizer": "max", "pattern": "staggered", "backend": "triton"}
    first, second = (run(asg.hybrid_attention, torch.float32, *case, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_a_single_token_and_rate_one_take_pytorchs_path() -> None:
    q, k, v, _, phis = inputs(1)
    with pytest.raises(TensorError, match="single token leaves no linear token"):
        asg.hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean", backend="triton")
    assert torch.equal(asg.hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean"), v)
    assert torch.allclose(asg.hybrid_attention(q, k, v, *phis, rate=1, backend="triton"), v)


# What the kernels lack, asked without the interpreter.


def test_explicit_triton_names_what_is_missing(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v, _, phis = inputs(8)
    with pytest.raises(TensorError, match="device type 'cpu' has no kernels; expected 'cuda'"):
        asg.hybrid_attention(q, k, v, *phis, rate=2, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TensorError, match=r"dtype torch.float64 has no kernels"):
        asg.hybrid_attention(q.double(), k.double(), v.double(), *phis, rate=2, backend="triton")
    q, k, v, _, phis = inputs(8, d=16)
    with pytest.raises(TensorError, match=r"head dim 16 has no kernels; expected one of \(32, 64, 128\)"):
        asg.hybrid_attention(q, k, v, *phis, rate=2, backend="triton")
    q, k, v, _, phis = inputs(8, degree=4)
    with pytest.raises(TensorError, match="phi_q has degree 4 and 2 layers; expected degree"):
        asg.hybrid_attention(q, k, v, *phis, rate=2, backend="triton")

    class Other(asg.FeatureMap):
        pass

    q, k, v, _, phis = inputs(8)
    with pytest.raises(TensorError, match="phi_k is a Other, whose activations the kernels do not know"):
        asg.hybrid_attention(q, k, v, phis[0], Other(2, 32), rate=2, backend="triton")
    with pytest.raises(ConfigError, match="backend 'cuda' does not exist; expected one of"):
        asg.hybrid_attention(q, k, v, *phis, rate=2, backend="cuda")  # type: ignore[arg-type]


@pytest.fixture
def other_devices():
    """What was found out about a device is forgotten, before the test and after it."""
    support._ask_device.cache_clear()
    yield
    support._ask_device.cache_clear()


def test_auto_on_a_gpu_takes_the_kernels_or_says_once_why_not(monkeypatch, caplog, other_devices) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(hybrid.eager, "hybrid_attention", lambda q, *_, **__: "PyTorch's path")
    monkeypatch.setattr("attention_surgery.ops.triton.path.hybrid_attention", lambda q, *_, **__: "the kernels")
    hybrid._log_reason.cache_clear()
    cases = [{}, {"degree": 5}, {"d": 16}, {"dtype": torch.float64}, {"layers": 1}]
    for case in cases * 2:
        shape = {"d": 32, "degree": 2, "layers": 2, "dtype": torch.bfloat16} | case
        with FakeTensorMode(), torch.device("cuda"):
            x = torch.empty(1, 9, 2, shape["d"], dtype=shape["dtype"])
            phi = asg.FeatureMap(2, shape["d"], degree=shape["degree"], layers=shape["layers"])
            taken = asg.hybrid_attention(x, x, x, phi, phi, rate=2)
            assert taken == ("PyTorch's path" if case else "the kernels")
            assert asg.hybrid_attention(x, x, x, phi, phi, rate=1) == "PyTorch's path"
            assert asg.hybrid_attention(x, x, x, phi, phi, rate=2, backend="eager") == "PyTorch's path"
    reasons = [
        "phi_q has degree 5 and 2 layers; expected degree (1, 2, 3) and 2 layers",
        "head dim 16 has no kernels; expected one of (32, 64, 128)",
        "dtype torch.float64 has no kernels",
        "phi_q has degree 2 and 1 layers",
    ]
    for record, reason in zip(caplog.records, reasons, strict=True):
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"hybrid attention takes the PyTorch path: {reason}")


def test_an_old_gpu_has_no_kernels(monkeypatch, other_devices) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(1, 9, 2, 32)
        phi = asg.FeatureMap(2, 32)
        with pytest.raises(TensorError, match=r"Tesla T4 is older than compute capability 8\.0; use backend 'auto'"):
            asg.hybrid_attention(x, x, x, phi, phi, rate=2, backend="triton")


def test_the_log_does_not_break_the_graph(caplog) -> None:
    hybrid._log_reason.cache_clear()

    @torch.compile(fullgraph=True, backend="eager")
    def double(x):
        hybrid.log_once("of a test")
        return 2 * x

    for n in (2, 3):
        assert torch.equal(double(torch.ones(n)), torch.full((n,), 2.0))
    said = [record.getMessage() for record in caplog.records if record.name == "attention_surgery"]
    assert said == ["hybrid attention takes the PyTorch path: of a test"]


def test_auto_on_the_cpu_says_nothing(caplog) -> None:
    q, k, v, _, phis = inputs(9)
    got = asg.hybrid_attention(q, k, v, *phis, rate=2, normalizer="max")
    assert torch.equal(got, asg.hybrid_attention(q, k, v, *phis, rate=2, normalizer="max", backend="eager"))
    assert not caplog.records
