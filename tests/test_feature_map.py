"""The feature map: Table 6's sizes, and what Eq. 5's denominator needs of it."""

import pytest
import torch

import attention_surgery as asg
from attention_surgery.errors import ConfigError, TensorError
from attention_surgery.layers.feature_map import SILU_SECOND_MOMENT, squareplus

EXTREMES = (-1e6, -300.0, -30.0, -1.0, 0.0, 1.0, 30.0, 300.0, 1e6)


@pytest.mark.parametrize("degree, layers, millions", [(6, 3, 15.36), (4, 2, 3.94), (3, 2, 2.37), (2, 2, 1.19)])
def test_table_6_parameters(degree, layers, millions):
    """One map at Wan2.1-1.3B's 12 heads of 128, as the paper's cells round (15.4, 3.9, 2.4, 1.2)."""
    phi = asg.FeatureMap(12, 128, degree=degree, layers=layers)
    count = sum(parameter.numel() for parameter in phi.parameters())
    assert round(count / 1e6, 2) == millions
    width = degree * 128
    assert count == 12 * (128 * width + width + (layers - 1) * (width**2 + width))


def test_two_maps_at_the_default_are_the_papers_2_4_million_per_block():
    count = sum(2 * parameter.numel() for parameter in asg.FeatureMap(12, 128).parameters())
    assert round(count / 1e6, 1) == 2.4


@pytest.mark.parametrize("degree, layers", [(1, 1), (2, 2), (3, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_non_negative_and_finite(dtype, degree, layers):
    torch.manual_seed(0)
    phi = asg.FeatureMap(2, 12, degree=degree, layers=layers).to(dtype)
    extremes = [x for x in EXTREMES if abs(x) ** degree < 1e30]
    x = torch.stack([torch.full((1, 8, 2, 12), value) for value in extremes]) + torch.randn(len(extremes), 1, 8, 2, 12)
    for rows in x.to(dtype):
        y = phi(rows)
        assert y.shape == (1, 8, 2, degree * 12) and y.dtype == dtype
        assert y.isfinite().all() and (y >= 0).all()
        assert (y > 0).any()  # φ_q·φ_k is never 0 for want of any feature


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squareplus_is_a_positive_smooth_relu(dtype):
    x = torch.tensor(EXTREMES, dtype=torch.float64)
    got = squareplus(x.to(dtype))
    assert (got > 0).all()
    exact = torch.where(x > 0, (x + torch.sqrt(x * x + 0.25)) / 2, 0.125 / (torch.sqrt(x * x + 0.25) - x))
    torch.testing.assert_close(got.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_alive_at_very_negative_pre_activations(dtype):
    """Where a final ReLU is dead for good, each parameter of the last layer still has a gradient."""
    torch.manual_seed(0)
    phi = asg.FeatureMap(2, 12).to(dtype)
    with torch.no_grad():
        phi.biases[-1].fill_(-100.0)
    phi(torch.randn(1, 64, 2, 12, dtype=dtype)).sum().backward()
    assert (phi.biases[-1].grad > 0).all()
    x = torch.tensor([-1e3, -30.0, -3.0], dtype=dtype, requires_grad=True)
    squareplus(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), 0.0625 / x.detach().double() ** 2, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "degree, layers, head_dim",
    [(1, 1, 12), (2, 1, 64), (2, 2, 12), (2, 2, 64), (2, 2, 128), (3, 2, 12), (3, 2, 128)],
)
def test_natural_scale(degree, layers, head_dim):
    """For inputs of unit variance the mean of φ_q·φ_k is about 1: the average softmax token's weight under "mean"."""
    torch.manual_seed(0)
    phi_q, phi_k = (asg.FeatureMap(8, head_dim, degree=degree, layers=layers) for _ in range(2))
    with torch.no_grad():
        q, k = phi_q(torch.randn(1, 256, 8, head_dim)), phi_k(torch.randn(1, 256, 8, head_dim))
    assert 0.9 < torch.einsum("bnhf,bmhf->bhnm", q, k).mean().item() < 1.25


def test_second_moment_of_silu():
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    moment = torch.trapezoid(torch.nn.functional.silu(x) ** 2 * density, x)
    assert moment.item() == pytest.approx(SILU_SECOND_MOMENT, abs=1e-4)


def test_each_head_has_its_own_map():
    torch.manual_seed(0)
    phi = asg.FeatureMap(3, 12)
    x = torch.randn(1, 5, 3, 12)
    y = phi(x)
    changed = x.clone()
    changed[:, :, 1] += 1
    same = (phi(changed) == y).all(dim=-1)[0]
    assert same[:, [0, 2]].all() and not same[:, 1].any()
    assert not torch.equal(*phi(x[:, :, :1].expand_as(x)).unbind(2)[:2])


def test_slices_are_raised_to_their_powers():
    torch.manual_seed(0)
    phi = asg.FeatureMap(1, 4, degree=3, layers=1)
    x = torch.randn(1, 5, 1, 4)
    embedding = squareplus(x[0, :, 0] @ phi.weights[0][0] + phi.biases[0][0])
    expected = torch.cat([embedding[:, 4 * p : 4 * p + 4] ** (p + 1) for p in range(3)], dim=-1) / 12**0.5
    torch.testing.assert_close(phi(x)[0, :, 0], expected)


@pytest.mark.parametrize("argument", ["heads", "head_dim", "degree", "layers"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bad_sizes(argument, value):
    sizes = {"heads": 2, "head_dim": 12, "degree": 2, "layers": 2} | {argument: value}
    with pytest.raises(ConfigError, match=f"FeatureMap needs {argument} >= 1, an integer; got {value}"):
        asg.FeatureMap(sizes.pop("heads"), sizes.pop("head_dim"), **sizes)


@pytest.mark.parametrize("shape", [(1, 5, 2, 16), (1, 5, 3, 12), (5, 2, 12)])
def test_bad_shape(shape):
    with pytest.raises(TensorError, match="feature map of 2 heads of 12 got shape"):
        asg.FeatureMap(2, 12)(torch.zeros(shape))
