"""The operator against Eq. 5: values, gradients, rounding, memory, bad input; and the sets of softmax tokens."""

import math
import subprocess
import sys

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

import attention_surgery as asg
from attention_surgery.errors import ConfigError, RateError, TensorError
from attention_surgery.ops import eager, naive
from attention_surgery.ops.tokens import lattice_steps, split_tokens

RATES = (1, 2, 3, 4, 8, "linear")
NORMALIZERS = ("max", "mean")
PATTERNS = ("stride", "staggered", "lattice")
GRIDS = {1: (1, 1, 1), 2: (1, 1, 2), 5: (1, 5, 1), 21: (3, 1, 7), 24: (2, 3, 4), 45: (3, 5, 3), 60: (3, 4, 5)}


def inputs(n, *, batch=1, heads=3, head_dim=12, degree=2, layers=2, dtype=torch.float64, seed=0, scale=1.0):
    """q, k, v and two feature maps whose biases are not zero; all of them leaves that require gradients."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(3, batch, n, heads, head_dim, dtype=torch.float64) * scale).to(dtype).unbind()
    phis = [asg.FeatureMap(heads, head_dim, degree=degree, layers=layers).to(dtype) for _ in range(2)]
    with torch.no_grad():
        for phi in phis:
            for bias in phi.biases:
                bias.normal_()
    return [x.detach().requires_grad_() for x in (q, k, v)], phis


def run(op, tensors, phis, *, dtype=None, **options):
    """The output, and the gradients of a fixed random projection of it, at q, k, v and every parameter of φ."""
    if dtype is not None:
        tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
        copies = [asg.FeatureMap(p.heads, p.head_dim, degree=p.degree, layers=p.layers).to(dtype) for p in phis]
        for copy, phi in zip(copies, phis, strict=True):
            copy.load_state_dict(phi.state_dict())
        phis = copies
    y = op(*tensors, *phis, **options)
    leaves = [*tensors, *(p for phi in phis for p in phi.parameters())]
    weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    grads = torch.autograd.grad(y, leaves, weight.to(y.dtype), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def relative_error(got, expected):
    return (
        ((got - expected).norm() / expected.norm().clamp(min=1e-300)).item() if expected.norm() else got.norm().item()
    )


def assert_exact(tensors, phis, **options):
    got = run(asg.hybrid_attention, tensors, phis, backend="eager", **options)
    expected = run(naive.hybrid_attention, tensors, phis, **options)
    assert got[0].dtype == expected[0].dtype == torch.float64
    assert [relative_error(a, b) < 1e-9 for a, b in zip(got, expected, strict=True)] == [True] * len(got)


# --- Eq. 5 ---------------------------------------------------------------------------------------------------------


def test_naive_is_equation_5_written_with_sums():
    """The oracle itself, once, against loops over single numbers."""
    n, rate, heads, d = 7, 3, 2, 4
    (q, k, v), (phi_q, phi_k) = inputs(n, heads=heads, head_dim=d)
    fq, fk = phi_q(q)[0], phi_k(k)[0]
    for normalizer in NORMALIZERS:
        got = naive.hybrid_attention(q, k, v, phi_q, phi_k, rate=rate, normalizer=normalizer)[0]
        for h in range(heads):
            for i in range(n):
                logits = {j: (q[0, i, h] @ k[0, j, h] / math.sqrt(d)).item() for j in range(n) if j % rate == 0}
                mean = math.log(sum(map(math.exp, logits.values())) / len(logits))
                c = max(logits.values()) if normalizer == "max" else mean
                weights = [math.exp(logits[j] - c) if j in logits else (fq[i, h] @ fk[j, h]).item() for j in range(n)]
                y = sum(w * v[0, j, h] for j, w in enumerate(weights)) / sum(weights)
                torch.testing.assert_close(got[i, h], y)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("rate", RATES)
def test_eager_is_exact(rate, normalizer, pattern):
    tensors, phis = inputs(45, batch=2)
    assert_exact(tensors, phis, rate=rate, normalizer=normalizer, pattern=pattern, grid=GRIDS[45])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n, rate", [(1, 2), (1, 8), (2, 2), (5, 8), (5, 4), (21, 4), (24, 8), (21, 64)])
def test_odd_lengths(n, rate, pattern, normalizer):
    tensors, phis = inputs(n)
    assert_exact(tensors, phis, rate=rate, normalizer=normalizer, pattern=pattern, grid=GRIDS[n])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("head_dim", [12, 32, 64, 128])
def test_head_dims(head_dim, normalizer):
    tensors, phis = inputs(21, head_dim=head_dim, heads=2)
    assert_exact(tensors, phis, rate=4, normalizer=normalizer)


@pytest.mark.parametrize("degree, layers", [(1, 1), (3, 1), (4, 3)])
def test_feature_map_shapes(degree, layers):
    tensors, phis = inputs(21, degree=degree, layers=layers)
    for normalizer in NORMALIZERS:
        assert_exact(tensors, phis, rate=4, normalizer=normalizer)
    assert_exact(tensors, phis, rate="linear")


@pytest.mark.parametrize("rows", [1, 7, 45])
def test_tiles_do_not_show(monkeypatch, rows):
    """The "max" path works through the queries in tiles; any size of tile, the same numbers."""
    tensors, phis = inputs(45)
    monkeypatch.setattr(eager, "TILE_ELEMENTS", rows * 3 * 12)
    assert_exact(tensors, phis, rate=4, normalizer="max")


def test_non_contiguous_inputs():
    """Attention layers hand over views: a fused projection, heads before tokens."""
    qkv = torch.randn(2, 3, 3, 21, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = [x.transpose(1, 2) for x in qkv.unbind(1)]
    _, phis = inputs(21)
    for normalizer in NORMALIZERS:
        options = {"rate": 4, "normalizer": normalizer}
        got = asg.hybrid_attention(*tensors, *phis, backend="eager", **options)
        torch.testing.assert_close(got, naive.hybrid_attention(*tensors, *phis, **options), rtol=1e-9, atol=1e-12)


def test_rate_1_is_softmax_attention():
    (q, k, v), phis = inputs(21)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    for normalizer in NORMALIZERS:
        y = asg.hybrid_attention(q, k, v, *phis, rate=1, normalizer=normalizer)
        torch.testing.assert_close(y, expected.transpose(1, 2), rtol=1e-9, atol=1e-12)


def test_large_logits_do_not_overflow():
    """exp(logit) of these is infinite in float32; Eq. 5 subtracts c first."""
    tensors, phis = inputs(21, scale=20.0)
    for normalizer in NORMALIZERS:
        y = asg.hybrid_attention(
            *(x.float() for x in tensors), *(p.float() for p in phis), rate=4, normalizer=normalizer
        )
        assert y.isfinite().all()


# --- the constant c ------------------------------------------------------------------------------------------------


def equation_5(q, k, v, phi_q, phi_k, c, rate):
    """Eq. 5 for given constants c (b h n 1), heads and all."""
    n = q.shape[1]
    soft = torch.arange(n) % rate == 0
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    features = torch.einsum("bihf,bjhf->bhij", phi_q(q), phi_k(k))
    weights = torch.where(soft, torch.exp(logits - c), features)
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)


def row_maximum(q, k, rate):
    logits = torch.einsum("bihd,bjhd->bhij", q, k[:, ::rate]) / math.sqrt(q.shape[-1])
    return logits.amax(dim=-1, keepdim=True)


def test_c_is_a_constant_for_the_gradient():
    (q, k, v), phis = inputs(21)

    def gradient(c):
        return torch.autograd.grad(equation_5(q, k, v, *phis, c, 4).square().sum(), q)[0]

    constant, moving = gradient(row_maximum(q, k, 4).detach()), gradient(row_maximum(q, k, 4))
    assert relative_error(moving, constant) > 1e-2  # Eq. 5 is not shift-invariant, so it does matter
    for op in (naive.hybrid_attention, asg.hybrid_attention):
        got = torch.autograd.grad(op(q, k, v, *phis, rate=4, normalizer="max").square().sum(), q)[0]
        assert relative_error(got, constant) < 1e-9


def test_mean_normalizer_is_differentiable_throughout():
    tensors, phis = inputs(5, heads=1, head_dim=4)

    def op(*tensors):
        return asg.hybrid_attention(*tensors, *phis, rate=2, normalizer="mean")

    assert torch.autograd.gradcheck(op, tensors)


def test_the_mean_mix_does_not_move_with_the_number_of_tokens():
    """The same tokens four times over: the same output under "mean"; another one with linear tokens counted by N."""
    (q, k, v), phis = inputs(24)
    four = [x.repeat(1, 4, 1, 1) for x in (q, k, v)]
    once = asg.hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean")
    torch.testing.assert_close(asg.hybrid_attention(*four, *phis, rate=4, normalizer="mean")[:, :24], once)


# --- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("rate", [2, 4, 8, "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_that_of_honest_rounding(dtype, rate, normalizer):
    """Against float64: at most twice (gradients three times) the error of the formula in the same dtype.

    A bias has 128 gradients, and the ratio of two maxima over so few passes 3 in one of 200 draws whoever rounds:
    biases are held to the norm alone.
    """
    tensors, phis = inputs(120, heads=2, head_dim=32, dtype=dtype)
    options = {"rate": rate, "normalizer": normalizer}
    oracle = run(naive.hybrid_attention, tensors, phis, dtype=torch.float64, **options)
    plain = run(naive.hybrid_attention, tensors, phis, **options)
    got = run(asg.hybrid_attention, tensors, phis, backend="eager", **options)
    assert got[0].dtype == dtype
    for i, (ours, theirs, exact) in enumerate(zip(got, plain, oracle, strict=True)):
        limit = 3 if i else 2
        assert relative_error(ours.double(), exact) <= limit * relative_error(theirs.double(), exact), i
        if exact.numel() > 128:
            assert (ours - exact).abs().max() <= limit * (theirs - exact).abs().max(), i


def test_half_precision_holds_many_tokens():
    """The sum of φ_k over the tokens is beyond float16's range; the state is a mean."""
    (q, k, v), phis = inputs(2000, heads=1, dtype=torch.float16)
    with torch.no_grad():
        k.fill_(30.0)
        assert phis[1](k).sum(dim=1, dtype=torch.float32).max() > torch.finfo(torch.float16).max
        for normalizer in NORMALIZERS:
            y = asg.hybrid_attention(q, k, v, *phis, rate=8, normalizer=normalizer, backend="eager")
            assert y.isfinite().all() and y.abs().max() <= v.abs().max() * 1.01


@pytest.fixture
def poisoned_memory():
    """PyTorch fills memory that it hands out uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_no_uninitialised_memory_is_read(poisoned_memory, normalizer, pattern):
    for n in (1, 5, 45):
        for rate in (2, 4, 8, "linear"):
            tensors, phis = inputs(n)
            grid = GRIDS[n]
            for x in run(
                asg.hybrid_attention, tensors, phis, rate=rate, normalizer=normalizer, pattern=pattern, grid=grid
            ):
                assert x.isfinite().all()


# --- memory --------------------------------------------------------------------------------------------------------

MEMORY = """
import re, sys, torch
import attention_surgery as asg

def gibibytes(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20

def tensors(n):
    x = [torch.randn(1, n, 2, 64, requires_grad=True) for _ in range(3)]
    for tensor in x:
        tensor.grad = torch.zeros_like(tensor)
    return x

def run(x, grid):
    y = asg.hybrid_attention(*x, *phis, **options, grid=grid)
    y.backward(torch.ones_like(y))

options = {"rate": 4, "normalizer": sys.argv[1], "pattern": sys.argv[2], "backend": "eager"}
phis = asg.FeatureMap(2, 64), asg.FeatureMap(2, 64)
run(tensors(60), (3, 4, 5))  # what is loaded and allocated once
x = tensors(12_600)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts from here
before = gibibytes("VmRSS")
run(x, (21, 20, 30))
print(gibibytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("normalizer, pattern", [("max", "stride"), ("mean", "lattice")])
def test_memory_is_linear(normalizer, pattern):
    """N = 12,600, 2 heads of 64, R = 4, float32, forward and backward: N×N/R scores alone would be 0.3 GB, their
    exponentials and gradients several times that; N×N scores 1.2 GB each."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, normalizer, pattern], capture_output=True, text=True, check=True, timeout=300
    )
    peak = float(out.stdout.split()[-1])
    print(f"{normalizer} {pattern}: {peak:.2f} GiB above inputs and outputs")
    assert 0.01 < peak < 0.7


# --- diffusers' dispatcher -----------------------------------------------------------------------------------------


def test_softmax_part_goes_through_the_dispatcher(monkeypatch):
    calls = []

    def record(q, k, v, *args, **kwargs):
        calls.append((tuple(q.shape), tuple(k.shape), kwargs["backend"]))
        return dispatch_attention_fn(q, k, v, *args, **kwargs)

    monkeypatch.setattr(eager, "dispatch_attention_fn", record)
    tensors, phis = inputs(21, dtype=torch.float32)
    asg.hybrid_attention(*tensors, *phis, rate=4, normalizer="mean", attention_backend="_native_math")
    asg.hybrid_attention(*tensors, *phis, rate=1, attention_backend="native")
    asg.hybrid_attention(*tensors, *phis, rate="linear")
    assert calls == [
        ((1, 21, 3, 12), (1, 6, 3, 12), "_native_math"),
        ((1, 21, 3, 12), (1, 21, 3, 12), "native"),
    ]


def test_every_attention_backend_of_diffusers_gives_the_same(monkeypatch):
    tensors, phis = inputs(21)
    options = {"rate": 4, "normalizer": "mean", "backend": "eager"}
    expected = naive.hybrid_attention(*tensors, *phis, rate=4, normalizer="mean")
    with attention_backend("_native_math"):
        torch.testing.assert_close(asg.hybrid_attention(*tensors, *phis, **options), expected)
    got = asg.hybrid_attention(*tensors, *phis, attention_backend="_native_math", **options)
    torch.testing.assert_close(got, expected)


# --- bad input -----------------------------------------------------------------------------------------------------


def bad(**changes):
    """The arguments of a good call, with some of them changed."""
    (q, k, v), (phi_q, phi_k) = inputs(12, dtype=torch.float32)
    return {"q": q, "k": k, "v": v, "phi_q": phi_q, "phi_k": phi_k, "rate": 4} | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": torch.zeros(12, 3, 12)}, TensorError, r"q has shape \(12, 3, 12\); expected b n h d"),
        (
            {"q": torch.zeros(1, 0, 3, 12)},
            TensorError,
            r"q has shape \(1, 0, 3, 12\); expected b n h d, none of them 0",
        ),
        (
            {"k": torch.zeros(1, 13, 3, 12)},
            TensorError,
            r"k has shape \(1, 13, 3, 12\); expected \(1, 12, 3, 12\), as q",
        ),
        (
            {"v": torch.zeros(1, 12, 3, 13)},
            TensorError,
            r"v has shape \(1, 12, 3, 13\); expected \(1, 12, 3, 12\), as q",
        ),
        ({"k": torch.zeros(1, 12, 3, 12).half()}, TensorError, r"k has dtype torch\.float16; expected torch\.float32"),
        (
            {"v": torch.zeros(1, 12, 3, 12).double()},
            TensorError,
            r"v has dtype torch\.float64; expected torch\.float32",
        ),
        ({"k": torch.zeros(1, 12, 3, 12, device="meta")}, TensorError, "k has device meta; expected cpu, as q"),
        ({"v": torch.zeros(1, 12, 3, 12, device="meta")}, TensorError, "v has device meta; expected cpu, as q"),
        ({"projection": torch.nn.Linear(12, 36)}, TensorError, "projection takes 12 features; q has 3 heads of 12"),
        (
            dict.fromkeys("qkv", torch.zeros(1, 12, 3, 12, dtype=torch.int64)),
            TensorError,
            r"q has dtype torch\.int64; expected a floating-point dtype",
        ),
        ({"phi_q": asg.FeatureMap(2, 12)}, TensorError, "phi_q is for 2 heads of 12; q has 3 heads of 12"),
        ({"phi_k": asg.FeatureMap(3, 16)}, TensorError, "phi_k is for 3 heads of 16; q has 3 heads of 12"),
        (
            {"phi_k": asg.FeatureMap(3, 12).to("meta")},
            TensorError,
            "feature map on meta got an input on cpu; move one of them",
        ),
        ({"phi_k": asg.FeatureMap(3, 12, degree=3)}, TensorError, "phi_k has 36 features; expected 24, as phi_q"),
        ({"rate": 0}, RateError, "rate 0 does not exist; expected an integer >= 1 or 'linear'"),
        ({"rate": 2.0}, RateError, r"rate 2\.0 does not exist"),
        ({"rate": True}, RateError, "rate True does not exist"),
        ({"rate": "4"}, RateError, "rate '4' does not exist"),
        ({"normalizer": "sum"}, ConfigError, r"normalizer 'sum' does not exist; expected one of \('max', 'mean'\)"),
        ({"pattern": "random"}, ConfigError, "pattern 'random' does not exist; expected one of"),
        ({"backend": "fast"}, ConfigError, "backend 'fast' does not exist; expected"),
        ({"pattern": "lattice"}, ConfigError, "pattern 'lattice' needs grid="),
        ({"pattern": "lattice", "grid": (2, 3, 4)}, TensorError, r"grid \(2, 3, 4\) does not hold the 12 tokens"),
        ({"pattern": "lattice", "grid": (3, 4)}, TensorError, r"grid \(3, 4\) does not hold"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        asg.hybrid_attention(**bad(**changes))
    assert isinstance(raised.value, ValueError)


# --- softmax tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [2, 3, 4, 8, 30])
@pytest.mark.parametrize("n", GRIDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_softmax_token_in_every_run(pattern, n, rate):
    mask = asg.softmax_token_mask(n, rate, pattern=pattern, heads=5, grid=GRIDS[n])
    assert mask.dtype == torch.bool and mask.shape == (5, n)
    assert all(run.sum() == 1 for row in mask for run in row.split(rate))
    x = torch.arange(n).view(1, n, 1, 1).expand(1, n, 5, 1)
    (soft,), (linear,) = split_tokens(rate, pattern, GRIDS[n], x)
    for head in range(5):
        assert soft[0, :, head, 0].tolist() == mask[head].nonzero().flatten().tolist()
        assert linear[0, :, head, 0].tolist() == (~mask[head]).nonzero().flatten().tolist()


def test_stride_is_the_papers_set():
    assert asg.softmax_token_mask(7, 3).int().tolist() == [[1, 0, 0, 1, 0, 0, 1]]


def test_all_and_none():
    assert asg.softmax_token_mask(7, 1, heads=2).all()
    assert not asg.softmax_token_mask(7, "linear", heads=2).any()


@pytest.mark.parametrize("pattern", ["staggered", "lattice"])
@pytest.mark.parametrize("rate", [2, 4, 8])
def test_over_the_heads_every_token_is_a_softmax_token_once(pattern, rate):
    mask = asg.softmax_token_mask(96, rate, pattern=pattern, heads=rate, grid=(3, 4, 8))
    assert (mask.sum(dim=0) == 1).all()


@pytest.mark.parametrize("rate", [2, 4])
def test_lattice_spreads_where_stride_takes_the_same_columns(rate):
    """At Wan's latent width 52, i mod R = 0 is the same columns in every row of every frame."""
    grid = (21, 30, 52)
    columns = asg.softmax_token_mask(21 * 30 * 52, rate, grid=grid).view(grid)
    assert (columns == columns[:1, :1]).all()
    lattice = asg.softmax_token_mask(21 * 30 * 52, rate, pattern="lattice", grid=grid).view(grid).double()
    for axis in range(3):
        rest = [other for other in range(3) if other != axis]
        share = lattice.mean(dim=rest)
        assert (share - 1 / rate).abs().max() < 0.05
    assert lattice_steps(rate) != (0, 0)


def test_bad_masks():
    with pytest.raises(RateError, match="rate 0 does not exist"):
        asg.softmax_token_mask(8, 0)
    with pytest.raises(ConfigError, match="pattern 'grid' does not exist"):
        asg.softmax_token_mask(8, 2, pattern="grid")
    with pytest.raises(TensorError, match="needs n >= 1 and heads >= 1; got n=0, heads=1"):
        asg.softmax_token_mask(0, 2)
    with pytest.raises(TensorError, match="got n=8, heads=0"):
        asg.softmax_token_mask(8, 2, heads=0)
