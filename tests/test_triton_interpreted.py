"""The Triton kernels, run by Triton's interpreter on the CPU, against Eq. 5 in float64.

The interpreter is chosen when Triton is imported, so the tests below the line run in a process of their own.
"""

import copy
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import attention_surgery as asg
from attention_surgery.errors import ConfigError, TensorError
from attention_surgery.ops import hybrid, naive

pytestmark = pytest.mark.slow  # the kernels are not finished: their error is not within bounds yet

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
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
        (7, 16, {}),  # fewer tokens than the rate
        (2, 2, {"h": 3}),
        (19, 3, {"degree": 1}),
        (17, 4, {"degree": 3, "h": 1}),
    ],
)
def test_output_and_gradients(n, rate, shape, normalizer, poisoned) -> None:
    assert_as_accurate_as_eager(inputs(n, **shape), rate=rate, normalizer=normalizer)


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


@interpreted
@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_logits_of_eighty(normalizer, poisoned) -> None:
    q, k, v, dy, phis = inputs(24, q_scale=25.0)
    logits = torch.einsum("bihd,bjhd->bhij", q, k[:, ::4]) / math.sqrt(q.shape[-1])
    assert logits.max() > 80 and logits.min() < -80
    assert_as_accurate_as_eager((q, k, v, dy, phis), rate=4, normalizer=normalizer)


@interpreted
@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_layouts(normalizer) -> None:
    """Fused projections, heads before tokens, channels apart, an odd address: the values of contiguous tensors."""
    q, k, v, dy, phis = inputs(20)
    expected = asg.hybrid_attention(q, k, v, *phis, rate=4, normalizer=normalizer, backend="triton")
    fused = torch.cat([q, k, v], dim=-1).tensor_split(3, dim=-1)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    odd = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    for layout in (fused, swapped, apart, odd):
        assert torch.equal(layout[0], q)
        got = asg.hybrid_attention(*layout, *phis, rate=4, normalizer=normalizer, backend="triton")
        assert torch.equal(got, expected)


@interpreted
def test_offsets_beyond_32_bits() -> None:
    """Tokens 2^29 elements apart: the address of the fifth does not fit in 32 bits. (The memory is never touched.)"""
    q, k, v, dy, phis = inputs(6, h=1, dtype=torch.float16)
    room = torch.empty(5 * 2**29 + 32, dtype=torch.float16)

    def spread(x: torch.Tensor) -> torch.Tensor:
        far = room.as_strided(x.shape, (0, 2**29, 32, 1))
        far.copy_(x)
        return far

    for name in ("q", "k", "v"):
        tensors = {"q": q, "k": k, "v": v}
        expected = gradients(tensors, dy, phis)
        tensors[name] = spread(tensors[name])
        for got, wanted in zip(gradients(tensors, dy, phis), expected, strict=True):
            assert torch.equal(got, wanted)


def gradients(tensors, dy, phis):
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    y = asg.hybrid_attention(*leaves, *phis, rate=2, normalizer="max", backend="triton")
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
@pytest.mark.parametrize("heads_per_round", [1, 2])
def test_rounds_change_nothing(heads_per_round, monkeypatch) -> None:
    from attention_surgery.ops.triton import backward

    case = inputs(20, b=2, h=2)
    options = {"rate": 4, "normalizer": "mean", "backend": "triton"}
    whole = run(asg.hybrid_attention, torch.float32, *case, **options)
    monkeypatch.setattr(backward, "WORKSPACE_BYTES", heads_per_round * 4 * 32 * 64 * 4)
    rounds = run(asg.hybrid_attention, torch.float32, *case, **options)
    assert all(torch.allclose(rounds[name], whole[name], rtol=1e-5, atol=1e-6) for name in whole)


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
    opcheck = torch.library.opcheck
    opcheck(operators.linear_state, (k, v, *parameters, None, 4), test_utils=checks)
    opcheck(operators.merge, (q, v, state, mass, *parameters, 0.1), test_utils=checks)
    opcheck(operators.attend, (q, k[:, ::4], v[:, ::4], state, mass, *parameters, 0.1), test_utils=checks)
    with torch.no_grad():
        y, denominator, top = operators.attend(q, k[:, ::4], v[:, ::4], state, mass, *parameters, 0.1)
        fakes = ("test_schema", "test_faketensor")
        opcheck(operators.linear_state_backward, (state, mass, k, v, *parameters, None, 4, True), test_utils=fakes)
        opcheck(
            operators.merge_backward, (v, y, denominator, q, state, mass, *parameters, 0.1, False), test_utils=fakes
        )
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
    case = inputs(30, h=3)
    options = {"rate": 4, "normalizer": "max", "pattern": "staggered", "backend": "triton"}
    first, second = (run(asg.hybrid_attention, torch.float32, *case, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_a_single_token_and_rate_one_take_pytorchs_path(caplog) -> None:
    q, k, v, dy, phis = inputs(1)
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
    with pytest.raises(ConfigError, match="backend 'cuda' does not exist; expected one of"):
        asg.hybrid_attention(q, k, v, *phis, rate=2, backend="cuda")  # type: ignore[arg-type]


def test_auto_falls_back_and_says_so_once(monkeypatch, caplog) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hybrid._log_reason.cache_clear()
    q, k, v, _, phis = inputs(9, degree=5)
    with caplog.at_level(logging.INFO, logger="attention_surgery"):
        for _ in range(3):
            got = asg.hybrid_attention(q, k, v, *phis, rate=2, normalizer="max")
    assert torch.equal(got, asg.hybrid_attention(q, k, v, *phis, rate=2, normalizer="max", backend="eager"))
    (record,) = caplog.records
    assert "hybrid attention takes the PyTorch path: phi_q has degree 5" in record.getMessage()
