"""The kernels on a GPU: at a size that fills it, where races show, and at small ones of every kind."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from attention_surgery import FeatureMap, hybrid_attention
from attention_surgery.layers.processor import HybridAttnProcessor
from attention_surgery.layers.projections import project_qkv
from attention_surgery.ops import naive

pytest.importorskip("triton")
from attention_surgery.ops.triton.hopper import launch
from attention_surgery.ops.triton.plan import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("rate", [8, "linear"])
@pytest.mark.parametrize("normalizer", ["mean", "max"])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(32_760, 12, 128), (32_760, 12, 64)])
def test_full_size_is_the_pytorch_path(tokens: int, heads: int, head_dim: int, normalizer, rate, monkeypatch) -> None:
    torch.manual_seed(0)
    q, k, v, dy = (
        torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )  # fmt: skip
    phis = [FeatureMap(heads, head_dim).cuda() for _ in range(2)]
    parameters = [parameter for phi in phis for parameter in phi.parameters()]

    def results(backend) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        y = hybrid_attention(*leaves, *phis, rate=rate, normalizer=normalizer, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, [*leaves, *parameters], dy)]

    plain, fused = results("eager"), results("triton")
    for _ in range(3):
        assert torch.equal(results("triton")[0], fused[0])  # the forward is deterministic
    assert all(ours.isfinite().all() for ours in fused)
    for ours, theirs in zip(fused[:4], plain[:4], strict=True):
        assert (ours.float() - theirs.float()).norm() <= 0.03 * theirs.float().norm()

    # Without gradients of φ the others are the same, if the sums over the tokens are split alike: two splits differ by
    # 1.3e-3, in the last place of what their states give.
    shares, split = Plan.shares, launch.split_steps
    monkeypatch.setattr(Plan, "shares", lambda self, tiles, programs: shares(self, tiles, 96))
    monkeypatch.setattr(launch, "split_steps", lambda steps, programs, processors: split(steps, 16, processors))
    trained = results("triton")[1:4]
    for phi in phis:
        phi.requires_grad_(False)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = hybrid_attention(*leaves, *phis, rate=rate, normalizer=normalizer, backend="triton")
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), trained, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 1e-3 * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 32_760, 12), (1, 18_480, 24), (2, 515, 40), (1, 3, 1)])
def test_norms_and_rotation_are_those_of_diffusers(batch: int, tokens: int, heads: int, dtype, autocast: bool) -> None:
    """q and k within twice, the gradients of all that they are made of within three times the error of the modules."""
    torch.manual_seed(0)
    width = heads * 128
    attn = WanAttention(width, heads, 128, processor=WanAttnProcessor()).cuda()
    attn.fused_projections = False
    if batch > 1:
        attn.fuse_projections()
    with torch.no_grad():
        for norm in (attn.norm_q, attn.norm_k):
            norm.weight.normal_()
    angles = torch.randn(tokens, 64, device="cuda").repeat_interleave(2, 1)[None, :, None]
    hidden = torch.randn(batch, tokens, width, device="cuda")
    grads = torch.randn(2, batch, heads, tokens, 128, device="cuda").transpose(2, 3)

    def results(wide: torch.dtype, backend) -> list[torch.Tensor]:
        narrow = autocast and wide == dtype
        layer, x = copy.deepcopy(attn), hidden.clone()
        if not narrow:
            layer, x = layer.to(wide), x.to(wide)
        with torch.autocast("cuda", dtype, enabled=narrow and dtype != torch.float32):
            q, k, v, _ = project_qkv(layer, x.requires_grad_(), (angles.cos(), angles.sin()), backend)
        assert q.dtype == k.dtype == v.dtype == wide
        assert ("Rotated" in type(q.grad_fn).__name__) == (backend == "auto")
        projection = layer.to_qkv if batch > 1 else layer.to_q
        leaves = [x, layer.norm_q.weight, layer.norm_k.weight, projection.weight, projection.bias]
        return [q.detach(), k.detach(), *torch.autograd.grad([q, k], leaves, [g.to(wide) for g in grads])]

    torch.backends.cuda.matmul.allow_tf32 = False
    fused, plain, oracle = results(dtype, "auto"), results(dtype, "eager"), results(torch.float64, "eager")
    floor = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
    for i, (ours, theirs, true) in enumerate(zip(fused, plain, oracle, strict=True)):
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (ours, theirs))
        assert error <= (3 if i > 1 else 2) * (allowed + floor), i


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("rate", "pattern"), [(8, "stride"), (2, "staggered"), ("linear", "stride")])
def test_a_layer_is_the_pytorch_path(rate, pattern, compiled: bool) -> None:
    """Output within twice, gradients within three times the error of the PyTorch path; keys are not kept."""
    torch.manual_seed(0)
    heads, tokens = 4, 3000
    attn = WanAttention(heads * 128, heads, 128, processor=WanAttnProcessor()).cuda()
    attn.fused_projections = False
    attn.set_processor(HybridAttnProcessor(heads, 128, rate=rate, pattern=pattern).cuda())
    angles = torch.randn(tokens, 64, device="cuda").repeat_interleave(2, 1)[None, :, None]
    rotary = angles.cos(), angles.sin()
    hidden, grad = torch.randn(2, 1, tokens, heads * 128, device="cuda")

    def results(dtype: torch.dtype, backend: str) -> tuple[list[torch.Tensor], int]:
        layer, x = copy.deepcopy(attn).to(dtype), hidden.to(dtype).requires_grad_()
        layer.processor.backend = backend
        run = torch.compile(layer, fullgraph=True) if compiled and backend == "triton" else layer
        run(x, rotary_emb=rotary)  # libraries take their work space at the first call
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        y = run(x, rotary_emb=rotary)
        kept = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
        leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))], kept

    (fused, kept), (plain, _), (oracle, _) = (
        results(torch.bfloat16, "triton"), results(torch.bfloat16, "eager"), results(torch.float64, "eager")
    )  # fmt: skip
    for i, (ours, theirs, true) in enumerate(zip(fused, plain, oracle, strict=True)):
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (ours, theirs))
        assert error <= (3 if i else 2) * allowed, i
    each = hidden.numel() * 2
    copied = {"linear": 0, 8: 1 / 8, 2: 2 / 2}[rate]  # softmax tokens: of k, and of v where they are gathered
    # q, k and v as projected, q as rotated, the softmax part's output or what is projected, the layer's output
    assert 6 <= kept / each - copied <= 6.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("normalizer", ["mean", "max"])
@pytest.mark.parametrize(
    "case",
    [
        {"n": 1000, "h": 3, "d": 128, "rate": 8},
        {"n": 1000, "h": 3, "d": 64, "rate": 8},
        {"n": 515, "h": 2, "d": 128, "rate": 4, "b": 2},
        {"n": 390, "h": 3, "d": 32, "rate": 3, "pattern": "staggered"},
        {"n": 360, "h": 5, "d": 64, "rate": 4, "pattern": "lattice", "grid": (6, 6, 10)},
        {"n": 257, "h": 2, "d": 128, "rate": "linear"},
        {"n": 40, "h": 3, "d": 128, "rate": 2, "b": 2},
        {"n": 700, "h": 3, "d": 128, "rate": 5, "pattern": "staggered"},
        {"n": 300, "h": 2, "d": 128, "rate": 4, "degree": 3},
        {"n": 300, "h": 2, "d": 64, "rate": 2, "degree": 1},
    ],
    ids=str,
)
def test_small_shapes_are_the_formula(case, normalizer, dtype) -> None:
    """Output and gradients within twice and three times the error of the PyTorch path in the same dtype."""
    torch.manual_seed(0)
    case = dict(case)
    n, h, d, b, degree = case.pop("n"), case.pop("h"), case.pop("d"), case.pop("b", 1), case.pop("degree", 2)
    tensors = [torch.randn(b, n, h, d, device="cuda").to(dtype) for _ in range(4)]
    phis = [FeatureMap(h, d, degree=degree).cuda() for _ in range(2)]

    def results(function, wide: torch.dtype, **options) -> list[torch.Tensor]:
        maps = [copy.deepcopy(phi).to(wide) for phi in phis]
        q, k, v, dy = (x.to(wide) if wide == torch.float64 else x.clone() for x in tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        y = function(*leaves, *maps, normalizer=normalizer, **case, **options)
        parameters = [parameter for phi in maps for parameter in phi.parameters()]
        return [y.detach(), *torch.autograd.grad(y, [*leaves, *parameters], dy)]

    oracle = results(naive.hybrid_attention, torch.float64)
    plain, fused = (results(hybrid_attention, torch.float32, backend=backend) for backend in ("eager", "triton"))
    floor = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
    for i, (ours, theirs, true) in enumerate(zip(fused, plain, oracle, strict=True)):
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (ours, theirs))
        assert error <= (3 if i else 2) * (allowed + floor), i


@pytest.mark.parametrize(("dtype", "of_autocast"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_softmax_part_in_the_dtype_of_autocast(dtype, of_autocast) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 500, 2, 128, device="cuda").to(dtype) for _ in range(3))
    phis = [FeatureMap(2, 128).cuda() for _ in range(2)]
    expected = naive.hybrid_attention(
        *(x.double() for x in (q, k, v)), *(copy.deepcopy(phi).double() for phi in phis), rate=4, normalizer="mean"
    )
    with torch.autocast("cuda", of_autocast):
        y = hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean", backend="triton")
    assert (y.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("far", [-30.0, -300.0])
@pytest.mark.parametrize(("rate", "normalizer"), [(4, "mean"), (4, "max"), ("linear", "mean")])
def test_features_far_below_zero(rate, normalizer, far: float) -> None:
    """φ is nearly 0 there: beside the softmax part its absolute error counts, alone ("linear") its relative one."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1000, 3, 128, device="cuda").bfloat16() for _ in range(3))
    phis = [FeatureMap(3, 128).cuda().requires_grad_(False) for _ in range(2)]
    for phi in phis:
        phi.biases[1].fill_(far)
    wide = [copy.deepcopy(phi).double() for phi in phis]
    options = {"rate": rate, "normalizer": normalizer}
    expected = naive.hybrid_attention(q.double(), k.double(), v.double(), *wide, **options)
    plain, y = (hybrid_attention(q, k, v, *phis, **options, backend=backend) for backend in ("eager", "triton"))
    error, allowed = ((x.double() - expected).norm() / expected.norm() for x in (y, plain))
    assert error <= 2 * allowed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 500, 2, 128, device="cuda:1", dtype=torch.bfloat16) for _ in range(3))
    phis = [FeatureMap(2, 128).to("cuda:1") for _ in range(2)]
    with torch.cuda.device(0):
        y = hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean", backend="triton")
    with torch.cuda.device(1):
        assert torch.equal(y, hybrid_attention(q, k, v, *phis, rate=4, normalizer="mean", backend="triton"))
