"""Distillation: the bank, the errors, and a run that is killed and goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from micro_wan import micro_pipeline

import attention_surgery as asg
from attention_surgery.distillation import DistillConfig, FeatureMapBank, distill, plan_distillation
from attention_surgery.distillation.losses import attention_loss, relative_error
from attention_surgery.distillation.trajectory import stochastic_euler
from attention_surgery.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    ModelError,
    RateError,
    RunError,
)
from attention_surgery.layers.capture import capture
from attention_surgery.ops import naive

PROMPTS = ["a red ball", "a blue ball", "red ball a", "blue"]
CONFIG = DistillConfig(
    num_trajectories=3,
    num_inference_steps=3,
    num_frames=5,
    height=32,
    width=32,
    max_sequence_length=16,
    heldout_prompts=1,
    lr=1e-2,
)
RATES = (2, 4, "linear")


@pytest.fixture(scope="module")
def pipe():
    return micro_pipeline()


@pytest.fixture(scope="module")
def bank(pipe):
    return distill(pipe, PROMPTS, RATES, config=CONFIG)


def test_every_block_and_rate_has_a_map_and_an_error(bank, pipe):
    blocks = range(len(pipe.transformer.blocks))
    assert bank.blocks == tuple(blocks)
    for block in blocks:
        assert set(bank.errors[block]) == set(RATES)
        assert all(0 < error < 1 for error in bank.errors[block].values())
        assert bank.errors[block][2] < bank.errors[block]["linear"]


def test_training_lowers_the_heldout_error(pipe, bank):
    longer = distill(pipe, PROMPTS, RATES, config=dataclasses.replace(CONFIG, num_trajectories=12))
    mean = lambda b: sum(sum(row.values()) for row in b.errors.values())  # noqa: E731
    assert mean(longer) < mean(bank)


def test_teacher_is_left_as_it_was(pipe):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    scheduler, rng = pipe.scheduler, torch.get_rng_state()
    distill(pipe, PROMPTS, (4,), config=CONFIG, blocks=[1])
    assert pipe.scheduler is scheduler
    assert torch.equal(torch.get_rng_state(), rng)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_passes_do_not_change_the_maps(pipe, bank):
    """Trained block by block, each block sees the same trajectories: the same maps as all blocks at once."""
    alone = distill(pipe, PROMPTS, RATES, config=CONFIG, blocks=[1])
    assert alone.errors[1] == bank.errors[1]


def test_capture_hands_out_what_attention_computes(pipe):
    seen = {}
    transformer = pipe.transformer
    inputs = (torch.randn(1, 4, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 16))
    with torch.no_grad():
        plain = transformer(*inputs, return_dict=False)[0]
        with capture(transformer, [0, 2], lambda block, *tensors: seen.update({block: tensors})):
            captured = transformer(*inputs, return_dict=False)[0]
    assert torch.equal(plain, captured)
    assert set(seen) == {0, 2}
    q, k, v, y = seen[2]
    phi = asg.FeatureMap(q.shape[2], q.shape[3])
    torch.testing.assert_close(naive.hybrid_attention(q, k, v, phi, phi, rate=1), y)


def test_attention_loss_is_equation_6(pipe):
    torch.manual_seed(0)
    n, rate = 11, 3
    q, k = torch.randn(2, 1, n, 2, 12).unbind()
    phi_q, phi_k = asg.FeatureMap(2, 12), asg.FeatureMap(2, 12)
    rows = torch.tensor([1, 4, 10])
    got = attention_loss(q, k, phi_q, phi_k, rate=rate, normalizer="max", pattern="stride", grid=None, rows=rows)
    terms = []
    for h in range(2):
        for i in rows.tolist():
            logits = q[0, i, h] @ k[0, :, h].T / 12**0.5
            c = logits[::rate].max()
            for j in range(n):
                if j % rate:
                    product = phi_q(q)[0, i, h] @ phi_k(k)[0, j, h]
                    terms.append(torch.log(1 + (torch.exp(logits[j] - c) - product) ** 2))
    torch.testing.assert_close(got, torch.stack(terms).mean())


def test_attention_loss_trains(pipe):
    config = dataclasses.replace(CONFIG, loss="attention", attention_loss_queries=8)
    assert 0 < distill(pipe, PROMPTS, (4,), config=config).errors[0][4] < 1


@pytest.mark.parametrize("normalizer", ["max", "mean"])
@pytest.mark.parametrize("pattern", ["stride", "staggered", "lattice"])
def test_errors_are_those_of_the_converted_layer(pipe, normalizer, pattern):
    """e_ir is what a converted block does to the teacher's own input, measured here with the oracle."""
    config = dataclasses.replace(CONFIG, normalizer=normalizer, pattern=pattern, num_trajectories=1)
    bank = distill(pipe, PROMPTS, (2,), config=config, blocks=[1])
    pair = bank.pairs[1][2]
    errors = []
    from attention_surgery.distillation.trajectory import run_teacher, token_grid
    from attention_surgery.files import digest

    def measure(block, q, k, v, y):
        y_hat = naive.hybrid_attention(
            q,
            k,
            v,
            pair.phi_q,
            pair.phi_k,
            rate=2,
            normalizer=normalizer,
            pattern=pattern,
            grid=token_grid(pipe, config),
        )
        errors.append(relative_error(y, y_hat).item())

    seed = int(digest([config.seed, "heldout", 0])[:12], 16)
    with capture(pipe.transformer, [1], measure):
        run_teacher(pipe, PROMPTS[-1:], seed=seed, config=config, on_step_end=lambda step: None)
    assert len(errors) == config.num_inference_steps * 2
    assert sum(errors) / len(errors) == pytest.approx(bank.errors[1][2], rel=1e-4)


def test_scheduler_is_stochastic_euler_with_the_pipelines_shift(pipe):
    scheduler = stochastic_euler(pipe.scheduler)
    assert scheduler.config.stochastic_sampling
    assert scheduler.config.shift == pipe.scheduler.config.flow_shift


def test_bank_round_trip_and_loading_into_a_model(bank, pipe, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    again = FeatureMapBank.from_pretrained(tmp_path / "bank")
    assert again.errors == bank.errors and again.spec == bank.spec and again.provenance == bank.provenance
    model = pipe.transformer
    rates = {0: 4, 1: 1, 2: "linear"}
    asg.convert_(model, again.hybrid_config(rates))
    try:
        again.load_into_(model)
        processor = model.blocks[2].attn1.processor
        expected = bank.pairs[2]["linear"].phi_k.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in processor.phi_k.state_dict().items())
    finally:
        asg.revert_(model)


def test_bank_refuses_what_does_not_fit(bank, pipe, tmp_path):
    with pytest.raises(RateError, match="no map for block 0 at rate 8"):
        bank.hybrid_config({0: 8})
    with pytest.raises(ModelError, match="no hybrid layer"):
        bank.load_into_(pipe.transformer)
    asg.convert_(pipe.transformer, asg.HybridConfig({0: 2}, degree=3))
    try:
        with pytest.raises(ModelError, match="was converted with"):
            bank.load_into_(pipe.transformer)
    finally:
        asg.revert_(pipe.transformer)
    bank.save_pretrained(tmp_path)
    whole = (tmp_path / "bank.safetensors").read_bytes()
    (tmp_path / "bank.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no readable bank"):
        FeatureMapBank.from_pretrained(tmp_path)
    description = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.safetensors").write_bytes(whole)
    (tmp_path / "bank.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(CheckpointError, match="another format"):
        FeatureMapBank.from_pretrained(tmp_path)
    (tmp_path / "bank.json").write_text(json.dumps(description | {"rates": [2, 4]}))
    with pytest.raises(CheckpointError, match="missing, extra or misshapen"):
        FeatureMapBank.from_pretrained(tmp_path)


WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_distillation import CONFIG, PROMPTS, RATES
import dataclasses
from attention_surgery.distillation import distill
from micro_wan import micro_pipeline
distill(micro_pipeline(), PROMPTS, RATES, config=dataclasses.replace(CONFIG, num_trajectories=40),
        output_dir=sys.argv[1], resume=True)
"""


def test_killed_and_resumed_is_the_unbroken_run(tmp_path):
    """SIGKILL at some trajectory, another SIGKILL later, then to the end: the same maps, errors and log.

    All runs are processes of one kind: sums differ in their last bit with the number of threads, and Adam makes much
    of that.
    """

    def start(folder):
        command = [sys.executable, "-c", WORKER, str(folder), str(Path(__file__).parent)]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "unbroken").wait(timeout=300) == 0
    folder = tmp_path / "killed"
    for rows in (3, 20):
        process = start(folder)
        log = folder / "log-000.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and len(log.read_text().splitlines()) >= rows):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "bank").exists()
    assert start(folder).wait(timeout=300) == 0
    unbroken, resumed = (FeatureMapBank.from_pretrained(tmp_path / name / "bank") for name in ("unbroken", "killed"))
    assert resumed.errors.keys() == unbroken.errors.keys()
    for block, row in unbroken.errors.items():
        assert resumed.errors[block] == pytest.approx(row, rel=1e-6)
    trajectories = [json.loads(line)["trajectory"] for line in (folder / "log-000.jsonl").read_text().splitlines()]
    assert trajectories == sorted(trajectories) and set(trajectories) == set(range(40))


def test_resume_is_bit_exact_in_one_process(pipe, tmp_path, monkeypatch):
    from attention_surgery.distillation import passes

    unbroken = distill(pipe, PROMPTS, RATES, config=CONFIG, output_dir=tmp_path / "a")
    run, calls = passes.run_teacher, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        run(*args, **kwargs)

    monkeypatch.setattr(passes, "run_teacher", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(pipe, PROMPTS, RATES, config=CONFIG, output_dir=tmp_path / "b")
    resumed = distill(pipe, PROMPTS, RATES, config=CONFIG, output_dir=tmp_path / "b", resume=True)
    assert resumed.errors == unbroken.errors
    for block in unbroken.blocks:
        for rate in RATES:
            mine, other = resumed.pairs[block][rate].state_dict(), unbroken.pairs[block][rate].state_dict()
            assert all(torch.equal(mine[name], other[name]) for name in other)


def test_run_folders_are_not_mixed(pipe, tmp_path):
    distill(pipe, PROMPTS, (4,), config=CONFIG, output_dir=tmp_path / "run", blocks=[0])
    with pytest.raises(RunError, match="holds a distillation run"):
        distill(pipe, PROMPTS, (4,), config=CONFIG, output_dir=tmp_path / "run", blocks=[0])
    with pytest.raises(RunError, match=r"lr: 0\.01 → 0\.02"):
        other = dataclasses.replace(CONFIG, lr=2e-2)
        distill(pipe, PROMPTS, (4,), config=other, output_dir=tmp_path / "run", blocks=[0], resume=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        distill(pipe, PROMPTS, (4,), config=CONFIG, output_dir=tmp_path / "foreign")
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": []}, DataError, "got 0 prompts"),
        ({"prompts": ["a", " "]}, DataError, "prompt 1 is empty"),
        ({"prompts": ["a", "a"]}, DataError, "given twice"),
        ({"prompts": ["a"]}, DataError, "held out"),
        ({"rates": ()}, RateError, "no rates"),
        ({"rates": (0,)}, RateError, "rate 0"),
        ({"rates": (1, 2)}, RateError, "softmax attention itself"),
        ({"rates": (2, 2)}, RateError, "twice"),
        ({"blocks": [3]}, RateError, "block 3 does not exist; this model has 3 blocks"),
        ({"blocks": []}, RateError, "none"),
        ({"config": dataclasses.replace(CONFIG, memory_gib=1e-6)}, ConfigError, r"needs .* GiB"),
        (
            {"config": dataclasses.replace(CONFIG, num_frames=6)},
            ConfigError,
            "num_frames is 6; this model takes 5 or 7",
        ),
        ({"config": dataclasses.replace(CONFIG, width=36)}, ConfigError, "width is 36; this model takes 32 or 40"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(pipe, tmp_path, change, error, message):
    arguments = {"prompts": PROMPTS, "rates": RATES, "config": CONFIG} | change
    prompts, rates = arguments.pop("prompts"), arguments.pop("rates")
    with pytest.raises(error, match=message):
        distill(pipe, prompts, rates, output_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_converted_teacher_is_refused(pipe):
    asg.convert_(pipe.transformer, asg.HybridConfig({0: 2}))
    try:
        with pytest.raises(ModelError, match="converted already"):
            distill(pipe, PROMPTS, RATES, config=CONFIG)
    finally:
        asg.revert_(pipe.transformer)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(pipe, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e25, num_trajectories=5)
    where = r"block \d at rate 2 has loss .* at step \d of trajectory \d, prompts \['"
    with pytest.raises(DivergenceError, match=where):
        distill(pipe, PROMPTS, (2,), config=config, output_dir=tmp_path)
    checkpoint = tmp_path / "pass-000.pt"
    if checkpoint.exists():
        maps = torch.load(checkpoint, weights_only=True)["maps"]
        assert all(tensor.isfinite().all() for pair in maps.values() for tensor in pair.values())


def test_a_map_that_breaks_in_the_last_update_is_not_kept(pipe, tmp_path, monkeypatch):
    """A gradient may be infinite where the loss is not; the maps of the checkpoint are then those before."""
    step = torch.optim.AdamW.step

    def broken(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3 * CONFIG.num_inference_steps * 2:  # the last one, with guidance
            self.param_groups[0]["params"][0].data[0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(DivergenceError, match="infinite or undefined feature maps at step 2 of trajectory 2"):
        distill(pipe, PROMPTS, (2,), config=CONFIG, output_dir=tmp_path)
    saved = torch.load(tmp_path / "pass-000.pt", weights_only=True)
    assert saved["trajectory"] == 2
    assert all(tensor.isfinite().all() for pair in saved["maps"].values() for tensor in pair.values())


def test_an_error_that_is_not_finite_stops(pipe, tmp_path, monkeypatch):
    from attention_surgery.distillation import passes

    monkeypatch.setattr(passes, "trajectory_errors", lambda *args, **kwargs: {"0/2": [0.1, float("nan")]})
    with pytest.raises(
        DivergenceError, match=r"error of block/rate 0/2 is not finite on the held-out prompts \['blue'"
    ):
        distill(pipe, PROMPTS, (2,), config=CONFIG, output_dir=tmp_path)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_checkpoint_is_named(pipe, tmp_path, damage):
    options = {"config": CONFIG, "output_dir": tmp_path, "blocks": [0]}
    distill(pipe, PROMPTS, (4,), **options)
    checkpoint = tmp_path / "pass-000.pt"
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    else:
        saved = torch.load(checkpoint, weights_only=True)
        del saved["maps"]["0/4"]["phi_q.weight_0"]
        torch.save(saved, checkpoint)
    with pytest.raises(CheckpointError, match=r"pass-000\.pt is (damaged|no checkpoint of this run)"):
        distill(pipe, PROMPTS, (4,), resume=True, **options)


def test_a_run_does_not_go_on_with_another_teacher(pipe, tmp_path):
    options = {"config": CONFIG, "output_dir": tmp_path, "blocks": [0]}
    distill(pipe, PROMPTS, (4,), **options)
    with pytest.raises(RunError, match="weights: "):
        distill(micro_pipeline(seed=1), PROMPTS, (4,), resume=True, **options)


def test_plan_keeps_to_its_memory():
    sizes = {"tokens": 32760, "heads": 12, "head_dim": 128, "element_size": 2}
    for memory in (8, 16, 40, 80):
        plan = plan_distillation(range(30), (2, 4, 8), DistillConfig(memory_gib=memory), **sizes)
        assert plan.memory_bytes <= memory * 2**30
        assert sorted(block for members in plan.passes for block in members) == list(range(30))
    assert len(plan.passes) == 1
    shared = plan_distillation(range(30), (2,), DistillConfig(memory_gib=80), world_size=4, **sizes)
    assert len(shared.passes) == 4


@pytest.mark.parametrize(
    "options",
    [{"loss": "mse"}, {"lr": 0.0}, {"batch_size": 0}, {"normalizer": "sum"}, {"pattern": "x"}, {"lr_schedule": "x"}],
)
def test_options_outside_their_range(options):
    with pytest.raises(ConfigError):
        DistillConfig(**options)
