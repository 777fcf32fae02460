"""What blocks cost: the paper's percentages, an independent formula, and latency on the device at hand."""

import json
from pathlib import Path

import pytest
import torch
from micro_wan import micro_transformer
from torch.utils.flop_counter import FlopCounterMode

from attention_surgery import FeatureMap, HybridConfig, convert_
from attention_surgery.cost import LatencyConfig, block_costs, profile
from attention_surgery.cost.__main__ import markdown
from attention_surgery.cost.flops import block_flops
from attention_surgery.cost.latency import settle
from attention_surgery.errors import ConfigError, ModelError, RateError
from attention_surgery.layers.processor import HybridAttnProcessor
from attention_surgery.models.wan import WanSpec

WAN_1_3B = WanSpec(blocks=30, heads=12, head_dim=128, ffn_dim=8960)
I2V = WanSpec(blocks=2, heads=4, head_dim=32, ffn_dim=200, image_tokens=257, added_kv_dim=128)
SMALL = WanSpec(blocks=3, heads=2, head_dim=12, ffn_dim=48)
LARGE_SIZE = {"num_frames": 81, "height": 480, "width": 832}
SMALL_SIZE = {"num_frames": 81, "height": 320, "width": 480}


def formula(spec, rate, n, degree=2, layers=2):
    """(projections, core, feature maps, cross-attention, feed-forward): 2 FLOPs per multiply-add, written by hand."""
    d, heads, head_dim = spec.dim, spec.heads, spec.head_dim
    features = degree * head_dim
    soft = 0 if rate == "linear" else -(-n // rate)
    linear = n - soft
    core = 4 * n * soft * d
    maps = 0
    if rate != 1:
        state = 2 * linear * features * d
        read_out = 2 * n * features * d + 2 * n * features * heads  # the numerator, the denominator
        core += state + read_out
        one_map = heads * (head_dim * features + (layers - 1) * features * features)
        maps = 2 * (n + linear) * one_map
    context = spec.text_tokens + spec.image_tokens
    cross = 4 * n * d * d + 4 * context * d * d + 4 * n * context * d
    return 8 * n * d * d, core, maps, cross, 4 * n * d * spec.ffn_dim


@pytest.mark.parametrize("rate", [1, 2, 3, 8, 100, "linear"])
@pytest.mark.parametrize(("spec", "n"), [(WAN_1_3B, 32760), (WAN_1_3B, 12600), (I2V, 61), (SMALL, 7)])
@pytest.mark.parametrize(("degree", "layers"), [(2, 2), (3, 1)])
def test_counted_flops_equal_the_formula(spec, n, rate, degree, layers):
    counted = block_flops(spec, rate, n, degree=degree, layers=layers)
    parts = (
        counted.projections,
        counted.core,
        counted.feature_maps,
        counted.cross_attention,
        counted.feed_forward,
    )
    assert parts == formula(spec, rate, n, degree, layers)
    assert counted.total == sum(parts)
    assert counted.attention == sum(parts[:3])


@pytest.mark.parametrize("rate", [2, 3, "linear"])
def test_normalizers_and_patterns_cost_the_same(rate):
    counts = set()
    for normalizer, pattern in (("mean", "stride"), ("max", "stride"), ("mean", "staggered"), ("max", "lattice")):
        with torch.device("meta"):
            attn = SMALL_MODEL.blocks[0].attn1
            processor = HybridAttnProcessor(2, 12, rate=rate, normalizer=normalizer, pattern=pattern)
            processor._attention_backend, processor.grid = "native", (3, 4, 5)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                processor(attn, torch.empty(1, 60, 24))
        counts.add(counter.get_total_flops())
    assert counts == {block_flops(SMALL, rate, 60).attention}


with torch.device("meta"):
    SMALL_MODEL = micro_transformer()


def test_share_of_self_attention():
    large, small = profile(WAN_1_3B, **LARGE_SIZE), profile(WAN_1_3B, **SMALL_SIZE)
    assert (large.tokens, small.tokens) == (32760, 12600)
    assert large.total_flops / 30 == pytest.approx(9.43e12, rel=1e-3)
    assert large.attention_share == pytest.approx(0.765, abs=5e-4)
    assert large.core_share == pytest.approx(0.699, abs=5e-4)
    assert small.attention_share == pytest.approx(0.586, abs=5e-4)
    assert small.core_share == pytest.approx(0.471, abs=5e-4)
    assert large.remaining == small.remaining == 1
    assert profile(WAN_1_3B).to_dict() == large.to_dict()


@pytest.mark.parametrize(
    ("count", "rate", "large", "small"),
    [
        (15, 2, 0.833, 0.897),
        (15, 4, 0.747, 0.840),
        (15, 8, 0.704, 0.812),
        (20, 4, 0.663, 0.787),
        (20, 8, 0.606, 0.749),
        (25, 8, 0.507, 0.686),
        (30, 8, 0.409, 0.624),
        (20, "linear", 0.549, 0.711),
    ],
)
def test_what_conversions_leave(count, rate, large, small):
    rates = dict.fromkeys(range(count), rate)
    assert profile(WAN_1_3B, rates=rates, **LARGE_SIZE).remaining == pytest.approx(large, abs=0.005)
    assert profile(WAN_1_3B, rates=rates, **SMALL_SIZE).remaining == pytest.approx(small, abs=0.005)


@pytest.mark.parametrize(
    ("degree", "layers", "params", "gflops"), [(6, 3, 15.4, 387), (4, 2, 3.9, 99), (3, 2, 2.4, 60), (2, 2, 1.2, 30)]
)
def test_one_feature_map_of_table_6(degree, layers, params, gflops):
    """Table 6 at 12,600 tokens, bias additions included; its 70 GFLOPs at P = 4 do not fit its own 3.9 M parameters."""
    with torch.device("meta"):
        phi = FeatureMap(12, 128, degree=degree, layers=layers)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            phi(torch.empty(1, 12600, 12, 128))
    biases = sum(bias.numel() for bias in phi.biases)
    assert round((counter.get_total_flops() + 12600 * biases) / 1e9) == gflops
    assert round(sum(parameter.numel() for parameter in phi.parameters()) / 1e6, 1) == params


def test_per_block_and_totals():
    rates = {0: 2, 2: "linear"}
    report = profile(SMALL, num_frames=5, height=32, width=48, rates=rates, degree=3, layers=1)
    assert (report.grid, report.tokens) == ((2, 2, 3), 12)
    parts = {block: formula(SMALL, rates.get(block, 1), 12, 3, 1) for block in range(3)}
    assert {block: flops.total for block, flops in report.per_block.items()} == {b: sum(p) for b, p in parts.items()}
    assert [flops.rate for flops in report.per_block.values()] == [2, 1, "linear"]
    total = sum(sum(p) for p in parts.values())
    assert report.total_flops == total
    assert report.attention_share == sum(sum(p[:3]) for p in parts.values()) / total
    assert report.core_share == sum(sum(p[1:3]) for p in parts.values()) / total
    assert report.remaining == total / (3 * sum(formula(SMALL, 1, 12)))
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["total_flops"] == total
    assert stored["per_block"]["2"] == {
        "rate": "linear",
        "projections": parts[2][0],
        "core": parts[2][1],
        "feature_maps": parts[2][2],
        "cross_attention": parts[2][3],
        "feed_forward": parts[2][4],
        "total": sum(parts[2]),
    }


def test_a_converted_model_has_its_own_rates():
    size = {"num_frames": 5, "height": 32, "width": 48}
    model = micro_transformer()
    dense = profile(model, **size)
    convert_(model, HybridConfig({1: 4}, degree=3, layers=1))
    assert profile(model, **size).per_block[1].total == sum(formula(SMALL, 4, 12, 3, 1))
    assert profile(model, **size).remaining == profile(SMALL, **size, rates={1: 4}, degree=3, layers=1).remaining
    assert profile(model, **size, rates={}).total_flops == dense.total_flops
    assert block_costs(model, **size) == block_costs(SMALL, **size)


def test_the_table_says_which_percentage_is_which():
    dense = str(profile(WAN_1_3B))
    assert "81 × 480 × 832 pixels = 21 × 30 × 52 = 32,760 tokens, one forward of one sample" in dense
    assert " 76.5 % of these FLOPs: self-attention, QKVO projections + core\n" in dense
    assert " 69.9 % of these FLOPs: self-attention without QKVO, core\n" in dense
    assert "100.0 % of the all-softmax blocks' FLOPs remain" in dense
    hybrid = str(profile(WAN_1_3B, rates=dict.fromkeys(range(15), 4) | {20: "linear"}))
    assert " 72.5 % of the all-softmax blocks' FLOPs remain" in hybrid
    assert "QKVO projections + core + φ" in hybrid
    rows = [line.split() for line in hybrid.splitlines()]
    assert ["softmax", "14", "0.618", "6.594", "0.000", "0.417", "1.803", "9.433", "100.0"] in rows
    assert ["hybrid,", "R", "=", "4", "15"] in [row[:5] for row in rows]
    assert ["linear", "1"] in [row[:2] for row in rows]
    assert all(len(line) <= 110 for line in hybrid.splitlines())


def test_block_costs_in_flops():
    costs = block_costs(WAN_1_3B)
    assert list(costs) == list(range(30))
    assert costs[0] == costs[29] == {rate: sum(formula(WAN_1_3B, rate, 32760)) for rate in (1, 2, 4, 8)}
    deep = block_costs(WAN_1_3B, (8, "linear"), **SMALL_SIZE, degree=6, layers=3)
    assert deep[3] == {rate: sum(formula(WAN_1_3B, rate, 12600, 6, 3)) for rate in (8, "linear")}
    costs[0][1] = 0
    assert costs[1][1] > 0


TIMED = WanSpec(blocks=2, heads=2, head_dim=32, ffn_dim=64)
TIMED_SIZE = {"num_frames": 61, "height": 320, "width": 320}  # 6400 tokens: self-attention is nearly all
QUICK = LatencyConfig(device="cpu", rounds=7, warmup=1)


def test_latency_on_the_cpu():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other, which would be measured instead
    torch.manual_seed(3)
    state = torch.get_rng_state()
    costs = block_costs(TIMED, (1, 2, 8, "linear"), unit="latency", latency=QUICK, **TIMED_SIZE)
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(costs) == [0, 1] and costs[0] == costs[1]
    assert list(costs[0]) == [1, 2, 8, "linear"]
    assert all(1e-5 < seconds < 60 for seconds in costs[0].values())
    assert costs[0][8] < 0.9 * costs[0][1]
    assert costs[0]["linear"] < 0.9 * costs[0][1]


@pytest.mark.parametrize("pattern", ["staggered", "lattice"])
def test_latency_times_the_layer_that_is_meant(pattern, monkeypatch):
    seen = []
    forward = HybridAttnProcessor.forward

    def record(self, attn, hidden_states, *args, **options):
        seen.append((self.rate, self.normalizer, self.pattern, self.grid, hidden_states.dtype, self._attention_backend))
        assert self.phi_q.degree == 3 and self.phi_q.weights[0].dtype == hidden_states.dtype
        return forward(self, attn, hidden_states, *args, **options)

    monkeypatch.setattr(HybridAttnProcessor, "forward", record)
    config = LatencyConfig(
        device="cpu",
        dtype="bfloat16",
        rounds=4,
        warmup=2,
        normalizer="max",
        pattern=pattern,
        attention_backend="native",
    )
    size = {"num_frames": 5, "height": 32, "width": 48}
    block_costs(SMALL, (1, 2, "linear"), unit="latency", latency=config, degree=3, **size)
    one_round = [(rate, "max", pattern, (2, 2, 3), torch.bfloat16, "native") for rate in (2, "linear")]
    assert seen == one_round * 6


def test_latency_stops_in_time(monkeypatch):
    calls = []
    forward = HybridAttnProcessor.forward
    monkeypatch.setattr(HybridAttnProcessor, "forward", lambda *args: calls.append(1) or forward(*args))
    config = LatencyConfig(device="cpu", rounds=10**6, warmup=50, max_seconds=0.001)
    block_costs(SMALL, (2,), unit="latency", latency=config, num_frames=5, height=32, width=48)
    assert len(calls) == 1 + 3


def test_settled_times_keep_their_ratios_on_a_machine_that_slows_down():
    true = [4.0, 3.0, 1.0]
    speed = [1, 1, 1, 5, 5, 5, 5, 1.1, 0.9]
    rounds = [[time * factor for time in true] for factor in speed]
    rounds[1][0] *= 40
    rounds[5][2] *= 100
    settled = settle(rounds)
    assert [time / settled[2] for time in settled] == pytest.approx([4.0, 3.0, 1.0])
    assert settle([[2.0, 1.0]] * 3) == pytest.approx([2.0, 1.0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_latency_on_the_accelerator():
    size = {"num_frames": 81, "height": 480, "width": 832}
    costs = block_costs(WAN_1_3B, (1, 8), unit="latency", latency=LatencyConfig(rounds=5), **size)[0]
    assert costs[8] < costs[1] < 1
    with pytest.raises(ConfigError, match="device 'cuda:99' cannot be used"):
        LatencyConfig(device="cuda:99").resolve_device()


def test_flops_leave_the_random_numbers_alone():
    state = torch.get_rng_state()
    profile(WanSpec(blocks=1, heads=3, head_dim=12, ffn_dim=8), rates={0: 2})
    assert torch.equal(torch.get_rng_state(), state)


def test_the_device_at_hand():
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = LatencyConfig().resolve_device()
    assert device == (accelerator or torch.device("cpu"))
    assert LatencyConfig().resolve_dtype(torch.device("cpu")) == torch.float32
    assert LatencyConfig().resolve_dtype(torch.device("cuda")) == torch.bfloat16
    assert LatencyConfig(dtype="float16").resolve_dtype(torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rates": {30: 4}}, RateError, r"block 30 does not exist; this model has 30 blocks \(0-29\)"),
        ({"rates": {-1: 4}}, RateError, "block -1 does not exist"),
        ({"rates": {"3": 4}}, RateError, "block '3' does not exist"),
        ({"rates": {3: 0}}, RateError, "rate 0 does not exist"),
        ({"rates": {3: 4}, "degree": 0}, ConfigError, "FeatureMap needs degree >= 1"),
        ({"num_frames": 80}, ConfigError, "num_frames is 80; this model takes 77 or 81"),
    ],
)
def test_bad_profiles(options, error, message):
    with pytest.raises(error, match=message):
        profile(WAN_1_3B, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((),), {}, RateError, "got no rates"),
        (((2, 2),), {}, RateError, "a rate is named twice"),
        (((1, "fast"),), {}, RateError, "rate 'fast' does not exist"),
        (((1, 2),), {"unit": "euro"}, ConfigError, "unit 'euro' does not exist; expected 'flops' or 'latency'"),
        (((1, 2),), {"height": 100}, ConfigError, "height is 100; this model takes 96 or 112"),
    ],
)
def test_bad_block_costs(arguments, options, error, message):
    with pytest.raises(error, match=message):
        block_costs(WAN_1_3B, *arguments, **options)
    with pytest.raises(ModelError, match="cannot read a Linear"):
        block_costs(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 2}, "rounds is 2; expected an integer >= 3"),
        ({"warmup": 0}, "warmup is 0; expected an integer >= 1"),
        ({"max_seconds": 0.0}, r"max_seconds is 0\.0; expected a number above 0"),
        ({"dtype": "int8"}, "dtype 'int8' is not timed"),
        ({"normalizer": "sum"}, "normalizer 'sum' does not exist"),
        ({"pattern": "random"}, "pattern 'random' does not exist"),
        ({"attention_backend": "abacus"}, "attention_backend 'abacus' does not exist"),
    ],
)
def test_bad_latency_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        LatencyConfig(**options)


@pytest.mark.parametrize("device", ["toaster", "meta"])
def test_devices_that_time_nothing(device):
    with pytest.raises(ConfigError, match=f"device '{device}'"):
        LatencyConfig(device=device).resolve_device()


def test_the_documented_tables_are_what_the_command_prints():
    page = Path(__file__).parents[1] / "docs" / "cost.md"
    assert markdown() in page.read_text(encoding="utf-8")
