"""The kernels on a GPU, at a size that fills it: what only shows where many programs run at once."""

import pytest
import torch

from attention_surgery import FeatureMap, hybrid_attention

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("rate", [8, "linear"])
@pytest.mark.parametrize("normalizer", ["mean", "max"])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(32_760, 12, 128), (32_760, 12, 64)])
def test_full_size_is_the_pytorch_path(tokens: int, heads: int, head_dim: int, normalizer, rate) -> None:
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
