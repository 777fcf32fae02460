"""The experiments: plans, one pass over all machinery at toy scale, resuming, tables from rows."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from attention_surgery.errors import ConfigError
from attention_surgery.experiments import EXPERIMENTS, run_experiments
from attention_surgery.experiments import run as run_module
from attention_surgery.experiments.laboratory import Laboratory
from attention_surgery.experiments.plans import BASE, Experiment, table4
from attention_surgery.experiments.summary import correlations, summarise
from attention_surgery.experiments.trial import FULL, QUICK, Maps, Trial

TOY = dataclasses.replace(QUICK, captions=1, sampling_steps=1, videos=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every kind of result once: homogeneous, exact and undistilled trials, maps at two lengths."""
    folder = tmp_path_factory.mktemp("experiments")
    do(folder, Laboratory(folder, TOY, 0))
    return folder


def plan() -> Experiment:
    two = Maps(rates=(8,))
    trials = {
        "undistilled": Trial(maps=two, blocks=4, rate=8, distilled=False, steps=0),
        "homogeneous": Trial(maps=two, blocks=4, rate=8, steps=1),
        "heterogeneous": Trial(maps=two, blocks=4, rate=8, heterogeneous=True, steps=1),
    }
    return Experiment(
        title="toy",
        trials=trials,
        banks={"a": two, "b": Maps(rates=(8,), normalizer="max")},
        pairs=(("undistilled", "homogeneous"),),
        lengths=True,
        frames=("homogeneous",),
    )


def do(folder, laboratory):
    run_module.do_seed({"toy": plan()}, laboratory)


def test_the_full_plans():
    trials, banks = set(), set()
    for make in EXPERIMENTS.values():
        experiment = make(FULL)
        assert experiment.trials or experiment.banks
        known = set(experiment.trials) | set(experiment.banks)
        assert {label for pair in experiment.pairs for label in pair} <= known and set(experiment.frames) <= known
        trials |= set(experiment.trials.values())
        banks |= set(experiment.banks.values())
    assert len(FULL.seeds) >= 3 and BASE in banks
    keys = {FULL.key(what, seed) for what in [*trials, *banks, None] for seed in FULL.seeds}
    assert len(keys) == 3 * (len(trials) + len(banks) + 1)
    assert [pair[1].endswith("heterogeneous") for pair in table4(FULL).pairs] == [True] * 4


def test_trials_do_what_they_say(folder):
    laboratory = Laboratory(folder, TOY, 0)
    undistilled, homogeneous, heterogeneous = (laboratory.find(trial) for trial in plan().trials.values())
    assert len(homogeneous["rates"]) == 4 and set(homogeneous["rates"].values()) == {8}
    errors = laboratory.find(Maps(rates=(8,)))["errors"]
    least = sorted(errors, key=lambda block: errors[block]["8"])[:4]
    assert sorted(homogeneous["rates"]) == sorted(least)
    assert heterogeneous["remaining"] <= homogeneous["remaining"]
    assert heterogeneous["error"] <= homogeneous["error"] + 1e-5
    assert undistilled["velocity_error"] > homogeneous["velocity_error"] > 0
    assert "heldout_loss" not in undistilled and len(homogeneous["heldout_loss"]) == 2
    assert [clip["caption"] for clip in homogeneous["clips"]] == laboratory.captions
    assert 0 <= homogeneous["clips"][0]["scores"]["total"] <= 1


def test_a_second_call_does_nothing_again(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.glob("*.jsonl")}
    assert set(before) == {"trials-0.jsonl", "banks-0.jsonl", "lengths-0.jsonl"}
    monkeypatch.setattr(Laboratory, "_distil", None)
    monkeypatch.setattr(Laboratory, "_judge", None)
    do(folder, Laboratory(folder, TOY, 0))
    assert before == {file.name: file.read_bytes() for file in folder.glob("*.jsonl")}
    key = TOY.key(plan().trials["homogeneous"], 0)
    rows = [row for row in before["trials-0.jsonl"].splitlines(keepends=True) if key.encode() not in row]
    (folder / "trials-0.jsonl").write_bytes(b"".join(rows))
    with pytest.raises(TypeError):  # the missing trial, and only that, is done again
        do(folder, Laboratory(folder, TOY, 0))
    (folder / "trials-0.jsonl").write_bytes(before["trials-0.jsonl"])


def test_tables_and_figures(folder):
    page = summarise("toy", plan(), folder, TOY)
    text = page.read_text()
    assert "homogeneous - undistilled" in text and "processor hours" in text
    with open(folder / "toy.csv") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    found = Laboratory(folder, TOY, 0).find(plan().trials["heterogeneous"])
    assert float(rows["heterogeneous"]["summed error"]) == pytest.approx(found["error"], rel=1e-4)
    assert float(rows["heterogeneous"]["Total"]) == pytest.approx(100 * found["clips"][0]["scores"]["total"], rel=1e-4)
    for name in ("toy.svg", "toy-errors.svg"):
        assert (folder / name).read_text().lstrip().startswith("<?xml")
    sheet = np.asarray(Image.open(folder / "toy-frames.png"))
    assert sheet.std() > 10


def test_a_missing_result_makes_no_table(folder):
    plans = plan()
    more = dataclasses.replace(plans, trials={**plans.trials, "new": Trial(blocks=1, rate=2, steps=0)})
    assert summarise("more", more, folder, TOY) is None
    assert not (folder / "more.md").exists()


def test_rank_correlation():
    rows = {
        str(i): [{"error": e, "velocity_error": v, "clips": [{"scores": {"total": t, "semantic": t}}]}]
        for i, (e, v, t) in enumerate([(1.0, 0.1, 0.9), (2.0, 0.2, 0.8), (3.0, 0.3, 0.7)])
    }
    found = {row["summed error with"]: float(row["Spearman"]) for row in correlations(rows)}
    assert found == {"velocity error": 1.0, "total": -1.0, "semantic": -1.0}


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match=r"experiment 'table9' does not exist; expected one of"):
        run_experiments(["table9"], tmp_path / "a")
    with pytest.raises(ConfigError, match="seed 7 is not one of"):
        run_experiments(["table3"], tmp_path / "a", seeds=(7,))
    assert not (tmp_path / "a").exists()
    (tmp_path / "experiments.json").write_text(json.dumps({"scale": "full"}))
    with pytest.raises(ConfigError, match="holds full results, not quick ones"):
        run_experiments(["table3"], tmp_path, quick=True)
