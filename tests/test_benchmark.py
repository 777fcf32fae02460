"""The benchmark: nothing wrong is timed, what is compared takes turns, and the tables say what the CSV says."""

import dataclasses
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from attention_surgery.benchmark import (
    BenchmarkConfig,
    check_rows,
    choices,
    describe_plan,
    kernels,
    measure,
    run_benchmark,
    timing,
    verification,
    workloads,
)
from attention_surgery.benchmark.cases import CPU_PLAN, GPU_PLAN, Case, plan_cases
from attention_surgery.benchmark.choices import BUDGETS, declared_errors
from attention_surgery.benchmark.floors import DEVICES, operator_floor
from attention_surgery.benchmark.plots import draw_figures, time_figure
from attention_surgery.benchmark.prepare import Check
from attention_surgery.benchmark.publish import PAGES, fill_page, publish_results
from attention_surgery.benchmark.rows import COLUMNS, read_rows, write_rows
from attention_surgery.benchmark.shapes import CPU_SHAPES, GPU_SHAPES, Shape, choose_shapes
from attention_surgery.benchmark.tables import break_even, newest, results_table, speed_table
from attention_surgery.benchmark.timing import MAX_REPEATS, interleave, median_interval, speedup
from attention_surgery.benchmark.variants import FASTEST, Variant
from attention_surgery.benchmark.verification import Verdict
from attention_surgery.benchmark.workloads import Place, build_transformer, wear
from attention_surgery.cost.flops import block_flops
from attention_surgery.errors import BenchmarkError, ConfigError, DataError, RateError
from attention_surgery.models import hybrid_processors
from attention_surgery.models.wan import WanSpec
from attention_surgery.ops.eager import softmax_attention

ROOT = Path(__file__).parents[1]
VIDEO = verification.VIDEO
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPEC = WanSpec(blocks=2, heads=2, head_dim=32, ffn_dim=64)
TINY = Shape(name="tiny", title="tiny, 9×64×64", spec=SPEC, video=(9, 64, 64), tokens=48, text_dim=16)
HYBRID = Variant(rate=4, backend="eager")
DENSE = Variant(rate=1, kernel="native")


def case(scope="op", *, number=1, variants=(HYBRID,), shape=TINY, **options):
    return Case(scope=scope, shape=shape, variants=variants, seconds=0.01, number=number, **options)


def run(folder, *cases, **options):
    said = []
    rows = run_benchmark(BenchmarkConfig(device="cpu", **options), folder, say=said.append, cases=cases)
    return rows, "\n".join(said)


@pytest.fixture(scope="module", autouse=True)
def small_checks_and_short_turns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "TOKENS", 130)
        patch.setattr(verification, "VIDEO", (9, 64, 96))
        patch.setattr(timing, "TURN_SECONDS", 0.002)
        patch.setattr(choices, "LATENCY_SECONDS", 0.2)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every scope and pass once, and a sweep, at tiny sizes."""
    folder = tmp_path_factory.mktemp("benchmark")
    sweep = [Shape(name=f"n{n}", title="2 heads × 32", spec=SPEC, tokens=n) for n in (64, 128, 256)]
    cases = [
        case("op", variants=(DENSE, HYBRID, dataclasses.replace(HYBRID, normalizer="max"))),
        case("op", backward=True),
        case("block"),
        case("block", backward=True),
        case("transformer"),
        case("transformer", backward=True),
        case("rates", variants=(HYBRID, dataclasses.replace(HYBRID, rate=8))),
        case("transformer", shape=dataclasses.replace(TINY, name="timed", time_per_token=True), backward=True),
        *(case("op", shape=shape) for shape in sweep),
    ]
    cases = [dataclasses.replace(each, number=number) for number, each in enumerate(cases, start=1)]
    run(folder, *cases)
    return folder / "benchmark.csv"


# --- what is measured ----------------------------------------------------------------------------------------------


def test_plans_name_shapes_that_there_are_and_begin_with_what_matters_most():
    for device, plan in ((CPU, CPU_PLAN), (CUDA, GPU_PLAN)):
        shapes = choose_shapes(device, ())
        assert {name for step in plan for name in step.shapes} == set(shapes)
        cases = plan_cases(BenchmarkConfig(), device)
        assert [each.number for each in cases] == list(range(1, len(cases) + 1))
        assert all(each.variants and len(set(each.variants)) == len(each.variants) for each in cases)
    first = plan_cases(BenchmarkConfig(), CUDA)[0]
    assert (first.scope, first.shape.tokens, first.shape.spec.heads) == ("op", 32760, 12)
    assert {variant.backend for variant in first.variants if not variant.dense} == {"triton"}


def test_parts_of_a_plan_can_be_named():
    cases = plan_cases(BenchmarkConfig(levels=("op",), shapes=("sweep",), rates=(3,)), CUDA)
    assert [each.shape.tokens for each in cases if not each.graphed] == [1024 * 2**power for power in range(8)]
    graphed = [each for each in cases if each.graphed]
    assert [each.shape.tokens for each in graphed] == [1024 * 2**power for power in range(5)]
    assert all(variant.graphed for each in graphed for variant in each.variants)
    assert {variant.rate for each in cases for variant in each.variants} == {3}
    training = plan_cases(BenchmarkConfig(levels=("training",)), CUDA)
    assert training and all(each.backward for each in training)
    forward = plan_cases(BenchmarkConfig(levels=("forward",)), CUDA)
    assert forward and all(each.scope == "transformer" and not each.backward for each in forward)


def test_the_fastest_dense_kernels_join_and_the_hybrids_get_the_fastest_at_their_rate(monkeypatch):
    ranked = ["flash_4_hub", "sdpa-cudnn", "_native_cudnn", "_native_flash"]
    monkeypatch.setattr(measure, "dispatched_kernels", lambda device: ("_native_cudnn", "_native_flash", "flash_4_hub"))

    def names(scope, ranked=ranked, kernel=None):
        by_rate = {1: ranked, case(scope).variants[0].rate: ["_native_flash", "_native_cudnn"]}
        variants = measure.with_kernels(case(scope), by_rate, CUDA, kernel).variants
        assert [variant.dense for variant in variants] == [True] * (len(variants) - 1) + [False]
        ours = [variant for variant in variants if variant.dense and not variant.stock]
        assert len(ours) == (scope == "transformer")
        fastest = [variant.kernel for variant in variants if variant.stock][-1]
        assert all((variant.kernel, variant.backend) == (fastest, "triton") for variant in ours)
        return [variant.kernel for variant in variants if variant not in ours]

    assert names("op") == ["_native_cudnn", "flash_4_hub", "_native_flash"]
    assert names("op", ranked[1:]) == ["_native_cudnn", "sdpa-cudnn", "_native_flash"]
    assert names("transformer") == ["_native_cudnn", "flash_4_hub", "_native_flash"]
    assert names("transformer", ranked[1:]) == ["_native_cudnn", "_native_flash"]
    assert names("rates") == ["_native_cudnn", "_native_cudnn"]
    assert names("block", kernel="flash_4_hub") == ["_native_cudnn", "flash_4_hub", "flash_4_hub"]


def test_a_kernel_that_takes_no_view_is_out_of_the_race_at_that_rate(monkeypatch, caplog):
    def picky(kernel):
        def attend(q, k, v):
            if kernel == "flash" and not k.is_contiguous():
                raise RuntimeError("contiguous keys only")
            return softmax_attention(q, k, v)

        return attend

    monkeypatch.setattr(workloads, "dense_attention", picky)
    monkeypatch.setattr(measure, "dispatched_kernels", lambda device: ("native", "flash"))
    dense = (Variant(rate=1, kernel="native"), Variant(rate=1, kernel="flash"))
    monkeypatch.setattr(measure, "dense_kernels", lambda rates, device: dense)
    place = Place(CPU, torch.float32)
    verdicts = {Check.of(each, case()): Verdict("verified", "") for each in dense}
    ranked = measure.rank_kernels(TINY, False, place, verdicts, rates=(4,))
    assert sorted(ranked[1]) == ["flash", "native"] and ranked[4] == ["native"]
    assert "flash does not run on every 4-th key" in caplog.text


def test_flash_attention_4_is_an_operator_that_compiles_and_trains(monkeypatch):
    """On a stand-in for the package, which computes what it does."""

    def forward(q, k, v, softmax_scale=None, return_lse=False):
        logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * (softmax_scale or q.shape[3] ** -0.5)
        return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(3), v), logits.logsumexp(3), None, None, None

    def backward(q, k, v, out, dout, lse, softmax_scale=None):
        scale = softmax_scale or q.shape[3] ** -0.5
        p = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale - lse[..., None]).exp()
        ds = p * (torch.einsum("bnhd,bmhd->bhnm", dout, v) - (out * dout).sum(3).transpose(1, 2)[..., None]) * scale
        dq, dk = torch.einsum("bhnm,bmhd->bnhd", ds, k), torch.einsum("bhnm,bnhd->bmhd", ds, q)
        return dq, dk, torch.einsum("bhnm,bnhd->bmhd", p, dout)

    package = types.SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", package)
    registry = kernels._HUB_KERNELS_REGISTRY[kernels.AttentionBackendName.FLASH_4_HUB]
    monkeypatch.setattr(registry, "kernel_fn", None)
    assert kernels.dispatched("flash_4_hub") == "flash_4_hub"
    q = torch.randn(1, 9, 2, 8, requires_grad=True)
    k, v = (torch.randn(1, 12, 2, 8, requires_grad=True) for _ in range(2))
    attend = torch.compile(lambda q, k, v: registry.kernel_fn(q=q, k=k, v=v), fullgraph=True, backend="aot_eager")
    grad = torch.randn(1, 9, 2, 8)
    for got, expected in zip(
        (attend(q, k[:, ::3], v[:, ::3]), *torch.autograd.grad(attend(q, k[:, ::3], v[:, ::3]), (q, k, v), grad)),
        (y := softmax_attention(q, k[:, ::3], v[:, ::3]), *torch.autograd.grad(y, (q, k, v), grad)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"levels": ("opp",)}, ConfigError),
        ({"minutes": 0}, ConfigError),
        ({"workers": -1}, ConfigError),
        ({"threads": 1.5}, ConfigError),
        ({"kernel": "fast"}, ConfigError),
        ({"rates": (1, 2)}, ConfigError),
        ({"rates": (2, 2)}, RateError),
        ({"rates": ()}, RateError),
    ],
)
def test_bad_settings_are_refused(options, error):
    with pytest.raises(error, match=r"got|expected|twice"):
        BenchmarkConfig(**options)


def test_what_the_device_does_not_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"shape 'wan' does not exist on cpu; expected some of .*'n8192'"):
        run_benchmark(BenchmarkConfig(device="cpu", shapes=("wan",)), tmp_path)
    with pytest.raises(ConfigError, match="device 'abacus'"):
        describe_plan(BenchmarkConfig(device="abacus"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        run_benchmark(BenchmarkConfig(device="cpu"), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_lists_the_cases_of_a_device_that_is_not_here_and_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "attention_surgery.cli", "benchmark", "--output", str(tmp_path / "out")]
    result = subprocess.run(
        [*command, "--device", "cuda", "--dry-run"], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "transformer, wan2.2-5b-704p, forward, compiled" in result.stdout and "R=8 mean staggered" in result.stdout
    assert list(tmp_path.iterdir()) == []


# --- nothing wrong is timed ----------------------------------------------------------------------------------------


def test_a_wrong_operator_is_named_and_never_timed(tmp_path, monkeypatch):
    honest = workloads.hybrid_attention
    monkeypatch.setattr(workloads, "hybrid_attention", lambda *a, **o: honest(*a, **o) * (1 + 1e-4))
    rows, said = run(tmp_path, case())
    wrong = next(row for row in rows if row.rate == "4")
    assert (wrong.status, wrong.p50_ms, wrong.speedup) == ("wrong", None, None)
    assert "times what is allowed" in wrong.note and "wrong" in said
    assert next(row for row in rows if row.rate == "1").status == "measured"
    with pytest.raises(BenchmarkError, match=r"op, tiny, forward, R=4 mean in PyTorch: wrong"):
        check_rows(rows)
    assert [row.status for row in read_rows(tmp_path / "benchmark.csv")] == [row.status for row in rows]


def test_a_wrong_gradient_is_wrong_too(tmp_path, monkeypatch):
    honest = workloads.hybrid_attention

    def off(q, k, v, *arguments, **options):
        return honest(q, k, v.detach() + 1.001 * (v - v.detach()), *arguments, **options)

    monkeypatch.setattr(workloads, "hybrid_attention", off)
    rows, _ = run(tmp_path, case())
    assert next(row for row in rows if row.rate == "4").status == "wrong"


@pytest.mark.parametrize("fault", ["a row is not a number", "a gradient is off", "none"])
def test_kernels_are_checked_at_the_size_that_is_timed_too(fault, tmp_path, monkeypatch):
    honest = workloads.hybrid_attention

    def kernels(q, k, v, *arguments, backend, **options):
        if backend == "triton" and q.shape[1] == TINY.tokens and fault == "a gradient is off":
            v = v.detach() + 1.001 * (v - v.detach())
        y = honest(q, k, v, *arguments, backend="eager", **options)
        if backend == "triton" and q.shape[1] == TINY.tokens and fault == "a row is not a number":
            y = torch.cat([y[:, :-1], y[:, -1:] * math.nan], dim=1)
        return y

    monkeypatch.setattr(workloads, "hybrid_attention", kernels)
    rows, _ = run(tmp_path, case(variants=(DENSE, dataclasses.replace(HYBRID, backend="triton"))))
    found = next(row for row in rows if row.rate == "4")
    assert found.status == ("measured" if fault == "none" else "wrong")
    named = {"a row is not a number": "y is nan", "a gradient is off": "dv is 0.001", "none": ""}[fault]
    assert found.note.startswith(named)
    if fault != "none":
        assert f"the PyTorch path's at {TINY.tokens} tokens" in found.note and found.p50_ms is None


def test_a_model_whose_output_is_not_finite_is_never_timed(tmp_path, monkeypatch):
    honest = workloads.hybrid_attention

    def broken(q, *arguments, **options):
        y = honest(q, *arguments, **options)
        return y * math.nan if q.shape[1] == TINY.tokens else y

    monkeypatch.setattr("attention_surgery.layers.processor.hybrid_attention", broken)
    rows, _ = run(tmp_path, case("block", variants=(HYBRID,)))
    found = next(row for row in rows if row.rate == "4")
    assert (found.status, found.note, found.p50_ms) == ("wrong", "the output is not finite", None)


def test_what_breaks_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    honest = workloads.hybrid_attention

    def breaks(*arguments, normalizer, **options):
        if normalizer == "max":
            raise RuntimeError("no such kernel\nand a long story")
        return honest(*arguments, normalizer=normalizer, **options)

    monkeypatch.setattr(workloads, "hybrid_attention", breaks)
    other = dataclasses.replace(HYBRID, normalizer="max")
    rows, _ = run(tmp_path, case(variants=(DENSE, other, HYBRID)))
    found = {row.variant: row for row in rows}
    assert found[other.name].status == "does not run" and found[other.name].note == "RuntimeError: no such kernel"
    assert found[HYBRID.name].status == "measured"
    with pytest.raises(BenchmarkError, match="R=4 max in PyTorch: does not run"):
        check_rows(rows)


def test_a_dense_kernel_that_a_machine_lacks_is_no_fault(tmp_path):
    absent = Variant(rate=1, kernel="_native_cudnn")
    rows, _ = run(tmp_path, case(variants=(DENSE, absent, HYBRID)))
    found = {row.variant: row for row in rows}
    assert found[absent.name].status == "does not run" and found[absent.name].note
    assert found[HYBRID.name].baseline == DENSE.name
    check_rows(rows)


def test_checks_run_in_processes_of_their_own(tmp_path):
    rows, said = run(tmp_path, case(), workers=1)
    assert [row.status for row in rows] == ["measured", "measured"]
    assert "checks, and compilations" in said


def test_cases_that_do_not_fit_are_listed_as_not_measured(tmp_path):
    rows, said = run(tmp_path, case(), minutes=1e-6)
    assert {row.status for row in rows} == {"not measured"} and {row.p50_ms for row in rows} == {None}
    assert "not measured" in said
    assert [row.variant for row in read_rows(tmp_path / "benchmark.csv")] == [row.variant for row in rows]
    check_rows(rows)


@pytest.mark.parametrize("shape", (*GPU_SHAPES, *CPU_SHAPES), ids=lambda shape: shape.name)
def test_a_small_model_can_stand_for_every_shape(shape):
    assert 100 < shape.spec.tokens(*VIDEO) < 1000
    assert math.prod(shape.latent_size()) == shape.tokens * math.prod(shape.spec.patch_size)


@pytest.mark.slow
def test_compiled_models_are_checked_and_timed(tmp_path):
    compiled = dataclasses.replace(HYBRID, compiled=True)
    cases = [case(scope, variants=(compiled,), compiled=True, backward=back)
             for scope in ("block", "transformer") for back in (False, True)]  # fmt: skip
    rows, _ = run(tmp_path, *cases)
    check_rows(rows)
    assert {row.status for row in rows} == {"measured"} and {row.compiled for row in rows} == {True}


# --- turns ---------------------------------------------------------------------------------------------------------


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: (order.append(name), torch.ones(1).sum().item(), _wait(0.031)) for name in "ABC"}
    times = interleave(calls, CPU, seconds=0, min_rounds=3)
    assert "".join(order) == "ABC" + "ABC" + "BCA" + "CAB"  # how long does it take? Then three rounds
    assert {len(values) for values in times.values()} == {3}
    assert all(value >= 31 for values in times.values() for value in values)


def test_short_calls_are_repeated_within_a_turn():
    count = [0]

    def call():
        count[0] += 1

    interleave({"A": call}, CPU, seconds=0, min_rounds=2)
    assert count[0] == 1 + 2 * MAX_REPEATS


def test_calls_that_lead_a_turn_in_are_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "_lead", lambda milliseconds, seconds, device: 2)
    count = [0]

    def call():
        count[0] += 1
        _wait(0.05 if count[0] % 3 == 1 else 0.2)  # how long does it take? Then two that lead in, one that is timed

    times = interleave({"A": call}, CPU, seconds=0, min_rounds=2)
    assert count[0] == 1 + 2 * (2 + 1)
    assert all(50 <= time < 200 for time in times["A"])


def test_a_lead_in_is_as_long_as_a_clock_takes():
    gpu = torch.device("cuda")
    assert [timing._lead(each, 0.1, gpu) for each in (0.001, 2.2, 43.0, 500.0)] == [MAX_REPEATS, 45, 2, 0]
    assert timing._lead(2.2, 0.1, CPU) == 0


def test_a_drift_of_the_machine_cancels():
    slowing = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert speedup([2 * time for time in slowing], slowing) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_median_holds_what_it_says():
    assert median_interval([3, 1, 2]) == (1, 3)
    assert median_interval(list(range(7))) == (0, 6)
    assert median_interval(list(range(10))) == (1, 8)
    values = torch.rand(4000, 15, generator=torch.Generator().manual_seed(0)).tolist()
    held = sum(low < 0.5 < high for low, high in map(median_interval, values)) / len(values)
    assert 0.95 <= held <= 0.98


def _wait(seconds):
    import time

    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


# --- rows ----------------------------------------------------------------------------------------------------------


def test_rows_hold_all_that_is_promised(finished):
    rows = read_rows(finished)
    assert finished.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert {row.status for row in rows if row.level != "rates"} == {"measured"}
    check_rows(rows)
    rows = [row for row in rows if row.status == "measured"]
    assert {(row.level, row.passes) for row in rows} == {
        *((level, passes) for level in ("op", "block", "transformer") for passes in ("forward", "forward + backward")),
        ("rates", "forward"),
    }
    for row in rows:
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms and row.rounds >= 5
        assert 0 < row.speedup_low <= row.speedup <= row.speedup_high
        assert FASTEST not in row.variant and row.kernel == "native" and row.baseline == "dense native"
        assert row.device and row.torch == torch.__version__ and row.diffusers and row.date and row.dtype == "float32"
        assert row.command == "attention-surgery benchmark --device cpu"
        assert row.peak_mib is None and row.cudnn == ""
        if row.rate == "1" and row.level != "rates":
            assert row.speedup == 1 and row.limit == 1
        if row.level != "rates":
            assert row.limit_share == pytest.approx(row.speedup / row.limit, rel=1e-4)
            count = block_flops(SPEC, int(row.rate), row.tokens)
            expected = {"op": count.core + count.feature_maps, "block": count.total, "transformer": 2 * count.total}
            assert row.flops == expected[row.level]


def test_rates_by_latency_stand_beside_rates_by_flops(finished):
    rows = [row for row in read_rows(finished) if row.level == "rates"]
    dense, *chosen = rows
    assert dense.variant == "dense native" and dense.predicted_ms > 0
    assert {(row.unit, row.budget) for row in chosen} == {(u, b) for u in ("flops", "latency") for b in BUDGETS}
    for row in chosen:
        if row.status == "measured":
            assert sum(int(part.split("×")[0]) for part in row.rate.split()) == SPEC.blocks
            assert row.predicted_ms > 0 and row.error >= 0
        else:
            assert "cannot be met" in row.note


def test_declared_errors_rise_with_the_rate():
    errors = declared_errors(30, (2, 4, 8))
    assert all(0 < row[2] < row[4] < row[8] for row in errors.values())
    assert len({row[8] for row in errors.values()}) > 5


def test_tables_that_are_no_benchmark_are_refused(finished, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"does not have the columns of a benchmark; differing: \['a'"):
        read_rows(tmp_path / "other.csv")
    text = finished.read_text().replace(",measured,", ",guessed,", 1)
    (tmp_path / "guessed.csv").write_text(text)
    with pytest.raises(DataError, match="line 2: status is 'guessed'"):
        read_rows(tmp_path / "guessed.csv")


def test_variants_wear_one_models_weights():
    model = build_transformer(TINY, Place(CPU, torch.bfloat16))
    worn = wear(model, dataclasses.replace(HYBRID, kernel="native"), {0: 4, 1: 1})
    assert list(hybrid_processors(worn)) == [0] and not hybrid_processors(model)
    assert hybrid_processors(worn)[0].backend == "eager"
    own = dict(worn.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    dtypes = {name.rpartition("blocks.0.")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["attn1.to_q.weight"] == torch.bfloat16 and dtypes["norm2.weight"] == torch.float32
    for backend, processors in (("", {}), ("triton", {0: False, 1: False})):
        worn = wear(model, dataclasses.replace(DENSE, backend=backend), 1)
        assert {place: each.enabled for place, each in hybrid_processors(worn).items()} == processors


# --- floors, tables, figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("rate", [1, 2, 4, 8])
def test_floors_are_what_is_counted(shape, rate):
    floor, n, dim = operator_floor(shape, rate), shape.tokens, shape.spec.dim
    count = block_flops(shape.spec, rate, n)
    assert floor.flops == pytest.approx(count.core + count.feature_maps, rel=1e-12)
    soft = math.ceil(n / rate)
    assert floor.softmax.flops == 4 * n * soft * dim
    if rate > 1:
        features, linear, heads = 2 * 128, n - soft, shape.spec.heads
        one_map = 2 * heads * (128 * features + features**2)
        assert floor.state.flops == pytest.approx(linear * one_map + 2 * linear * features * dim)
        assert floor.merge.flops == pytest.approx(n * one_map + 2 * n * features * (dim + heads))
        assert floor.merge.milliseconds(DEVICES[0]) < floor.softmax.milliseconds(DEVICES[0])


def test_break_even_lies_between_what_was_measured():
    assert break_even([(1024, 0.5), (4096, 2.0), (8192, 3.0)]) == "about 2,000"
    assert break_even([(1024, 1.5), (4096, 2.0)]) == "below 1,024"
    assert break_even([(1024, 1.5), (4096, 0.9)]) == "above 4,096"


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_what_their_csv_files_say(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- benchmark " in text
    assert fill_page(text, ROOT) == text


def test_results_go_into_the_pages_and_figures_and_stay_there(finished, tmp_path):
    for page in PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        names = ("speed",) if page == "README.md" else ("counts", "floors", "limits", "results")
        marks = "\n\n".join(f"<!-- benchmark {name} -->\nold\n<!-- end -->" for name in names)
        (tmp_path / page).write_text(f"before\n\n{marks}\n\nafter\n")
    (tmp_path / "speed.csv").write_bytes(finished.read_bytes())
    written = publish_results([tmp_path / "speed.csv"], tmp_path)
    assert [path.name for path in written] == ["README.md", "performance.md", "speed_time.svg", "speed_speedup.svg"]
    results = (tmp_path / "docs/performance.md").read_text()
    assert "old" not in results and results.startswith("before\n") and results.endswith("after\n")
    assert "tiny, 9×64×64" in results and "breaks even" in results and "by latency" in results
    assert fill_page(results, tmp_path) == results
    with pytest.raises(DataError, match="has no marks"):
        publish_results([finished], finished.parent)


def test_tables_say_what_was_not_measured(finished):
    assert speed_table([])[-1] == "| any GPU | | not yet measured | | | |"
    assert results_table([]) == ["On a GPU: not yet measured."]
    rows = read_rows(finished)
    rows = [dataclasses.replace(row, shape="n8192", tokens=8192) for row in rows if row.case == 1]
    (_, _, line, rest) = speed_table(rows)
    own, dense = (next(row for row in rows if row.variant == name) for name in (HYBRID.name, DENSE.name))
    assert f"N = 8,192, 2 heads × 32, float32 | {dense.p50_ms:.4g} | {own.speedup:.2f}×" in line
    assert "not yet measured" in rest


def test_of_two_cases_of_a_kind_the_one_that_was_measured_more_is_shown(finished):
    rows = [dataclasses.replace(row, shape="n8192", tokens=8192) for row in read_rows(finished) if row.case == 1]
    empty = {"p50_ms": None, "speedup": None, "baseline": "", "status": "not measured", "date": "earlier"}
    skipped = [dataclasses.replace(row, **empty) for row in rows]
    assert speed_table([*skipped, *rows]) == speed_table(rows)
    assert "Not yet measured: op, tiny, 9×64×64, N = 8,192, forward." in results_table(skipped)
    assert not any(line.startswith("Not yet measured") for line in results_table([*skipped, *rows]))


def test_a_case_that_was_measured_again_is_shown_as_it_was_last(finished):
    rows = [
        dataclasses.replace(row, speedup_low=row.speedup, speedup_high=row.speedup)
        for row in read_rows(finished)
        if row.case == 1
    ]
    again = [dataclasses.replace(row, date="later", p50_ms=row.p50_ms and row.p50_ms / 2) for row in rows]
    assert newest([*again, *rows]) == newest([*rows, *again]) == again
    disturbed = [dataclasses.replace(row, speedup_high=row.speedup and 1.6 * row.speedup) for row in again]
    assert newest([*disturbed, *rows]) == newest([*rows, *disturbed]) == rows
    both = [dataclasses.replace(row, date="latest") for row in disturbed]
    assert newest([*both, *disturbed]) == both
    elsewhere = [dataclasses.replace(row, device="another") for row in again]
    stopped = [dataclasses.replace(row, p50_ms=None, status="not measured") for row in again]
    fewer = [row for row in again if row.variant != HYBRID.name]
    packaged = [dataclasses.replace(row, kernel="flash_4_hub") for row in again]
    alone = [dataclasses.replace(row, p50_ms=None if row.rate == "1" else row.p50_ms) for row in again]
    for other in (elsewhere, stopped, fewer, packaged, alone):
        assert newest([*rows, *other]) == [*rows, *other]


def test_what_a_package_made_faster_stands_beside_what_pytorch_alone_did(finished):
    rows = [dataclasses.replace(row, shape="n8192", tokens=8192) for row in read_rows(finished) if row.case == 1]
    packaged = [
        dataclasses.replace(row, date="later", p50_ms=row.p50_ms and row.p50_ms / 2, kernel="flash_4_hub")
        for row in rows
        if row.p50_ms
    ]
    alone, beside = speed_table([*packaged, *rows])[2:4]
    dense = next(row for row in rows if row.variant == DENSE.name).p50_ms
    assert f"| {dense:.4g} |" in alone and f"| {dense / 2:.4g} (FlashAttention 4) |" in beside
    text = "\n".join(results_table([*packaged, *rows]))
    assert f"| {dense:.4g} |" in text and f"| {dense / 2:.4g} (FlashAttention 4) |" in text


def test_dense_attention_with_our_norms_is_no_baseline(finished, tmp_path, monkeypatch):
    """It is checked and timed beside the others, and stands by itself."""
    ours = dataclasses.replace(DENSE, backend="eager")  # what runs without a GPU
    real = measure.interleave

    def faster(calls, *args, **options):
        times = real(calls, *args, **options)
        return times | {ours: [time / 10 for time in times[DENSE]]} if ours in times else times

    monkeypatch.setattr(measure, "interleave", faster)
    rows, _ = run(tmp_path, case("transformer", variants=(DENSE, ours, HYBRID)))
    assert [row.variant for row in rows] == ["dense native", "dense native with our norms", "R=4 mean in PyTorch"]
    assert {row.status for row in rows} == {"measured"} and {row.baseline for row in rows} == {"dense native"}
    text = "\n".join(results_table(rows))
    assert rows[1].speedup == pytest.approx(10)
    assert f"- transformer, tiny, 9×64×64, forward, eager, dense: {rows[1].speedup:.2f}×" in text
    with pytest.raises(BenchmarkError, match="with our norms: does not run"):
        check_rows([dataclasses.replace(rows[1], status="does not run")])
    assert "with our norms" not in "\n".join(results_table(read_rows(finished)))
    monkeypatch.setattr(verification, "verify_model", lambda *_: 2.0)
    faulty, _ = run(tmp_path / "faulty", case("transformer", variants=(DENSE, ours, HYBRID)))
    assert {row.variant: row.status for row in faulty} == {
        "dense native": "measured", "dense native with our norms": "wrong", "R=4 mean in PyTorch": "wrong",
    }  # fmt: skip


def test_what_runs_as_a_cuda_graph_stands_by_itself(finished):
    rows = [row for row in read_rows(finished) if row.level == "op" and row.title == "2 heads × 32"]
    graphed = [
        dataclasses.replace(row, graphed=True, variant=f"{row.variant} as a CUDA graph", date="later",
                            baseline=row.baseline and f"{row.baseline} as a CUDA graph")
        for row in rows
    ]  # fmt: skip
    table = results_table([*rows, *graphed])
    assert (
        sum("| forward |  |" in line for line in table)
        == sum("| forward | CUDA graph |" in line for line in table)
        == 3
    )
    assert len([line for line in table if line.startswith(f"- {HYBRID.name}")]) == 2
    assert len(time_figure([*rows, *graphed]).axes) == 2 and len(time_figure(rows).axes) == 1
    rows, graphed = ([dataclasses.replace(row, shape="n8192") for row in some] for some in (rows, graphed))
    assert len(speed_table(rows)) == 4 and speed_table([*graphed, *rows]) == speed_table(rows)


def test_a_file_from_before_cuda_graphs_is_read(finished, tmp_path):
    table = [line.split(",") for line in finished.read_text().splitlines()]
    place = table[0].index("graphed")  # no text with a comma stands before it
    lines = [",".join(cells[:place] + cells[place + 1 :]) for cells in table]
    (tmp_path / "earlier.csv").write_text("\n".join(lines) + "\n")
    assert read_rows(tmp_path / "earlier.csv") == read_rows(finished)
    (tmp_path / "earlier.csv").write_text("\n".join([lines[0].replace("case", "ca"), *lines[1:]]))
    with pytest.raises(DataError, match=r"differing: \['ca', 'case'\]"):
        read_rows(tmp_path / "earlier.csv")


@pytest.mark.parametrize(
    ("fault", "status", "note"),
    [
        (workloads.WrongGraph("it is 1 from its kernels"), "wrong", "it is 1 from its kernels"),
        (RuntimeError("no capture"), "does not run", "RuntimeError: no capture"),
    ],
)
def test_a_graph_that_fails_costs_no_other_variant_its_place(fault, status, note, tmp_path, monkeypatch):
    """Without a GPU there is nothing to capture: what would be a graph is a call, or fails as a graph does."""
    faults, honest = [], measure.make_calls

    def graphs_of(turns):
        def call():
            if faults:
                raise faults.pop()
            return turns[0]()

        return call

    def make_calls(*arguments):
        faults.append(fault)
        return honest(*arguments)

    monkeypatch.setattr(workloads, "graphs_of", graphs_of)
    monkeypatch.setattr(measure, "make_calls", make_calls)
    variants = tuple(dataclasses.replace(each, graphed=True) for each in (DENSE, HYBRID))
    rows, _ = run(tmp_path, case(variants=variants, graphed=True))
    assert {row.rate: (row.status, row.note) for row in rows} == {"1": (status, note), "4": ("measured", "")}
    assert all(row.graphed for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_that_computes_something_else_is_refused():
    x, calls = torch.ones(8, device="cuda"), []

    def growing():
        calls.append(1)
        return x * len(calls)

    pool = torch.cuda.graph_pool_handle()
    assert torch.equal(workloads.capture(lambda: 2 * x, pool)(), 2 * x)
    with pytest.raises(workloads.WrongGraph, match="from that of its kernels launched one by one"):
        workloads.capture(growing, pool)
    rotated = workloads.graphs_of([lambda: 2 * x, lambda: 3 * x])
    assert [float(rotated()[0]) for _ in range(4)] == [2, 3, 2, 3]


def test_figures_need_nothing_but_the_file(finished, tmp_path):
    rows = read_rows(finished)
    write_rows(tmp_path / "a.csv", [row for row in rows if row.level == "block"])
    assert [path.name for path in draw_figures(tmp_path / "a.csv")] == ["a_speedup.svg"]
    drawn = (tmp_path / "a_speedup.svg").read_text()
    assert "<svg" in drawn
    draw_figures(tmp_path / "a.csv")
    assert (tmp_path / "a_speedup.svg").read_text() == drawn
