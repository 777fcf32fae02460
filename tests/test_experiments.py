"""The experiments: plans, one pass over all machinery at toy scale, sharing and resuming, tables from rows."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from micro_wan import micro_pipeline, micro_transformer
from PIL import Image
from pretended_work import ONE, items_of, pretend

from attention_surgery.errors import ConfigError
from attention_surgery.experiments import EXPERIMENTS, laboratory, run_experiments, variants, workers
from attention_surgery.experiments import run as run_module
from attention_surgery.experiments.agenda import agenda, needs
from attention_surgery.experiments.laboratory import Laboratory
from attention_surgery.experiments.plans import BASE, Experiment, table4, table6
from attention_surgery.experiments.records import Item, Records
from attention_surgery.experiments.summary import finding, summarise
from attention_surgery.experiments.tables import correlations, map_cost
from attention_surgery.experiments.trial import FULL, QUICK, Maps, Trial
from attention_surgery.experiments.workers import Site, perform
from attention_surgery.layers import FeatureMap

TOY = dataclasses.replace(QUICK, captions=1, sampling_steps=1, videos=3)
VARIANT = Maps(rates=(8,), final="relu")


def plan() -> Experiment:
    trials = {
        "undistilled": Trial(maps=ONE, blocks=4, rate=8, distilled=False, steps=0),
        "homogeneous": Trial(maps=ONE, blocks=4, rate=8, steps=1),
        "heterogeneous": Trial(maps=ONE, blocks=4, rate=8, heterogeneous=True, steps=0),
    }
    return Experiment(
        title="toy",
        trials=trials,
        banks={"a": ONE, "b": Maps(rates=(8,), normalizer="max")},
        pairs=(("a", "b"), ("undistilled", "homogeneous")),
        lengths=True,
        frames=("homogeneous",),
        shown=("motion",),
    )


PLANS = {"toy": plan(), "variants": Experiment(title="variants", banks={"a": ONE, "relu": VARIANT}, dead=True)}


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A random pipeline of tiny-wan's shapes in its place: what it draws is noise, but in milliseconds."""
    base = tmp_path_factory.mktemp("base")
    pipe = micro_pipeline()
    torch.manual_seed(0)
    pipe.transformer = micro_transformer(num_layers=5)
    pipe.save_pretrained(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laboratory, "EMBEDDED", str(base))
        laboratory._stock.cache_clear()
        laboratory._costs.cache_clear()
        yield
    laboratory._stock.cache_clear()
    laboratory._costs.cache_clear()


@pytest.fixture(scope="module")
def folder(micro, tmp_path_factory):
    """Every kind of result once: homogeneous, exact and undistilled trials, maps at two lengths, a variant."""
    folder = tmp_path_factory.mktemp("experiments")
    run_module.do_missing(PLANS, Records(folder, TOY), (0,), device="cpu")
    return folder


def test_the_full_plans():
    trials, banks = set(), set()
    for make in EXPERIMENTS.values():
        experiment = make(FULL)
        assert experiment.trials or experiment.banks
        known = set(experiment.trials) | set(experiment.banks)
        assert {label for pair in experiment.pairs for label in pair} <= known and set(experiment.frames) <= known
        assert not any(trial.maps.varied for trial in experiment.trials.values())
        trials |= set(experiment.trials.values())
        banks |= set(experiment.banks.values())
    assert len(FULL.seeds) >= 3 and BASE in banks
    keys = {FULL.key(what, seed) for what in [*trials, *banks, None] for seed in FULL.seeds}
    assert len(keys) == 3 * (len(trials) + len(banks) + 1)
    assert [pair[1].endswith("heterogeneous") for pair in table4(FULL).pairs] == [True] * 4
    assert len(table6(FULL).trials) == 4 * 3


def test_the_agenda_finishes_whole_experiments_and_starts_with_what_is_waited_for(tmp_path):
    plans = {name: make(FULL) for name, make in EXPERIMENTS.items()}
    items = agenda(plans, Records(tmp_path, FULL), FULL.seeds)
    assert len(set(items)) == len(items)
    place = {item: number for number, item in enumerate(items)}
    assert all(place[need] < place[item] for item in items for need in needs(item))
    kinds = [item.kind for item in items]
    assert kinds[:3] == ["bank"] * 3 and kinds.count("teacher") == 3 and kinds.count("videos") == 1
    first = agenda({"figure3": plans["figure3"], "table3": plans["table3"]}, Records(tmp_path, FULL), (1,))
    assert [item.kind for item in first] == ["bank", "teacher", "videos", *["trial"] * 4]
    assert {item.seed for item in first if item.kind != "videos"} == {1}


def test_trials_do_what_they_say(folder):
    records = Records(folder, TOY)
    undistilled, homogeneous, heterogeneous = (records.find(Item("trial", 0, t)) for t in plan().trials.values())
    assert len(homogeneous["rates"]) == 4 and set(homogeneous["rates"].values()) == {8}
    errors = records.find(Item("bank", 0, ONE))["errors"]
    least = sorted(errors, key=lambda block: errors[block]["8"])[:4]
    assert sorted(homogeneous["rates"]) == sorted(least)
    assert heterogeneous["remaining"] <= homogeneous["remaining"]
    assert heterogeneous["error"] <= homogeneous["error"] + 1e-5
    assert undistilled["error"] == homogeneous["error"]
    assert len({row["velocity_error"] for row in (undistilled, homogeneous, heterogeneous)} - {0.0}) == 3
    assert "heldout_loss" not in undistilled and len(homogeneous["heldout_loss"]) == 2
    assert len(homogeneous["clips"]) == 1 and 0 <= homogeneous["clips"][0]["scores"]["total"] <= 1
    assert homogeneous["device"].startswith("CPU") and homogeneous["versions"]["torch"] == torch.__version__
    assert not any((folder / "work" / "finetune").iterdir())


def test_every_seed_has_captions_of_its_own():
    records = Laboratory(Path("nowhere"), TOY, "cpu")
    captions = [set(records.captions(seed)) for seed in FULL.seeds]
    assert all(len(found) == TOY.captions for found in captions) and len(set.union(*captions)) == len(captions)


def test_variants_have_errors_and_dead_features(folder):
    row = Records(folder, TOY).find(Item("bank", 0, VARIANT))
    ours = Records(folder, TOY).find(Item("bank", 0, ONE))
    assert ours["dead"] == {"8": 0.0} and 0 <= row["dead"]["8"] < 0.5
    assert row["errors"].keys() == ours["errors"].keys() and row["errors"] != ours["errors"]


def test_a_variant_that_varies_nothing_is_the_library_s_map():
    torch.manual_seed(0)
    ours = FeatureMap(2, 8, degree=3, layers=3)
    torch.manual_seed(0)
    same = variants.VariantMap(2, 8, degree=3, layers=3, hidden="silu", final="squareplus", weights="natural")
    x = torch.randn(2, 5, 2, 8)
    torch.testing.assert_close(same(x), ours(x))


@pytest.mark.parametrize("final", ["softplus", "relu", "elu+1"])
def test_other_activations_start_at_the_same_scale(final):
    torch.manual_seed(0)
    options = {"degree": 2, "layers": 2, "hidden": "silu", "weights": "natural"}
    ours, other = (variants.VariantMap(8, 32, final=name, **options) for name in ("squareplus", final))
    x = torch.randn(1, 2000, 8, 32)
    assert other(x).mean().item() == pytest.approx(ours(x).mean().item(), rel=0.15)


def test_dead_features_are_counted(folder):
    place = Laboratory(folder, TOY, "cpu")
    pipe, prompts = place._pipe(torch.float32), place._prompts(0)
    config = TOY.distillation(VARIANT, 0)
    bank = variants.distil_variant(
        pipe, prompts, VARIANT, config=config, folder=folder / "work" / "banks" / TOY.key(VARIANT, 0)
    )
    for row in bank.pairs.values():
        row[8].phi_q.biases[-1].data[:, :6] = -1e6  # a quarter of the features of one of two maps
    before = Records(folder, TOY).find(Item("bank", 0, VARIANT))["dead"]["8"]
    found = variants.dead_features(pipe, bank, prompts[-1], config=config)
    assert 0.125 <= found[8] <= 0.125 + before


def test_a_second_call_does_nothing_again(folder, monkeypatch):
    rows = {file: file.read_bytes() for file in folder.glob("*-0.jsonl")}
    assert {file.name for file in rows} == {"trials-0.jsonl", "banks-0.jsonl", "lengths-0.jsonl"}
    assert agenda(PLANS, Records(folder, TOY), (0,)) == []
    monkeypatch.setattr(workers, "_doer", None)
    run_module.do_missing(PLANS, Records(folder, TOY), (0,))
    assert rows == {file: file.read_bytes() for file in folder.glob("*-0.jsonl")}


def test_what_is_missing_is_done_again_and_so_are_maps_that_it_needs(folder, tmp_path):
    trial = Item("trial", 0, plan().trials["homogeneous"])
    key = Records(folder, TOY).key(trial).encode()
    for file in folder.glob("*-0.jsonl"):
        kept = [row for row in file.read_bytes().splitlines(keepends=True) if key not in row]
        (tmp_path / file.name).write_bytes(b"".join(kept))
    assert agenda(PLANS, Records(tmp_path, TOY), (0,)) == [Item("bank", 0, ONE), Item("videos"), trial]
    bank = Records(tmp_path, TOY).bank_folder(ONE, 0) / "bank" / "bank.json"
    bank.parent.mkdir(parents=True)
    bank.touch()
    assert agenda(PLANS, Records(tmp_path, TOY), (0,)) == [Item("videos"), trial]


def test_tables_and_figures(folder):
    page = summarise("toy", plan(), Records(folder, TOY))
    text = page.read_text()
    assert "homogeneous − undistilled" in text and "minutes of one process" in text and "CPU" in text
    assert text.rstrip().endswith("Not yet interpreted.") and "b − a" in text
    with open(folder / "toy.csv") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    found = Records(folder, TOY).find(Item("trial", 0, plan().trials["heterogeneous"]))
    assert float(rows["heterogeneous"]["summed error"]) == pytest.approx(found["error"], rel=1e-4)
    assert float(rows["heterogeneous"]["Total"]) == pytest.approx(100 * found["clips"][0]["scores"]["total"], rel=1e-4)
    assert "motion" in rows["heterogeneous"]
    for name in ("toy.svg", "toy-errors.svg"):
        assert (folder / name).read_text().lstrip().startswith("<?xml")
    sheet = np.asarray(Image.open(folder / "toy-frames.png"))
    assert sheet.std() > 10
    assert "dead features %" in summarise("variants", PLANS["variants"], Records(folder, TOY)).read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_page_from_made_up_rows(name, tmp_path):
    experiment, records = EXPERIMENTS[name](FULL), Records(tmp_path, FULL)
    rng = np.random.default_rng(0)
    for item in agenda({name: experiment}, records, FULL.seeds):
        row = {"seconds": 1.0, "device": "none", "versions": {"torch": "0"}}
        if item.kind in ("bank", "lengths"):
            rates = [str(rate) for rate in item.what.rates]
            row["errors"] = {str(block): {rate: rng.random() for rate in rates} for block in range(8)}
            row["dead"] = {rate: rng.random() for rate in rates}
        elif item.kind != "videos":
            names = ("total", "quality", "semantic", "dynamic_degree", "motion")
            scores = [{score: rng.random() for score in names} for _ in range(4)]
            row["clips"] = [{"caption": f"caption {i}", "scores": score} for i, score in enumerate(scores)]
            row |= {"error": rng.random(), "velocity_error": rng.random(), "remaining": rng.random()}
            row["heldout_loss"] = [1.0, 0.5]
        if item.kind != "videos":
            records.append(item, row)
    page = summarise(name, dataclasses.replace(experiment, frames=()), records).read_text()
    assert page.startswith(f"# {experiment.title}") and page.rstrip().endswith(finding(name))
    assert all(label in page for label in [*experiment.trials, *experiment.banks])
    assert all(f"{two} − {one}" in page for one, two in experiment.pairs)
    if name == "table6":
        assert "| 2 | 2 |" in page and "| 1.19 | 30 |" in page
    if name == "table5":
        assert "| motion |" in page


def test_what_a_map_costs_as_in_table_6():
    for degree, layers, millions, billions in ((6, 3, 15.4, 387), (3, 2, 2.4, 60), (2, 2, 1.2, 30)):
        parameters, flops = map_cost(degree, layers, heads=12, head_dim=128, tokens=12_600)
        assert round(parameters / 1e6, 1) == millions and round(flops / 1e9) == billions


def test_a_missing_result_makes_no_table(folder):
    more = dataclasses.replace(plan(), trials={**plan().trials, "new": Trial(blocks=1, rate=2, steps=0)})
    assert summarise("more", more, Records(folder, TOY)) is None
    assert not (folder / "more.md").exists()


def test_rank_correlation():
    rows = {
        str(i): [{"error": e, "velocity_error": v, "clips": [{"scores": {"total": t, "semantic": t, "quality": t}}]}]
        for i, (e, v, t) in enumerate([(1.0, 0.1, 0.9), (2.0, 0.2, 0.8), (3.0, 0.3, 0.7)])
    }
    found = {row["summed error with"]: float(row["Spearman"]) for row in correlations(rows)}
    assert found == {"velocity error": 1.0, "total": -1.0, "semantic": -1.0, "quality": -1.0}


SHARED = """
import json, os, pathlib, sys
sys.path.insert(0, {tests!r})
from pretended_work import RunError, Item, items_of, pretend
from attention_surgery.experiments import workers
from attention_surgery.experiments.agenda import needs
from attention_surgery.experiments.trial import QUICK
workers._doer = pretend
site = workers.Site(pathlib.Path("nowhere"), QUICK, "cpu", 1)
rows = []
"""


def share(tmp_path, body: str) -> subprocess.CompletedProcess[str]:
    """Run `body` where the spawned processes, too, only pretend: they import the main module again."""
    script = tmp_path / "share.py"
    tests = os.path.dirname(os.path.abspath(__file__))
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    script.write_text(f"{SHARED.format(tests=tests)}\nif __name__ == '__main__':\n{lines}\n")
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)


def test_processes_share_the_items_and_wait_for_what_they_need(tmp_path):
    result = share(
        tmp_path,
        """
workers.perform(items_of(4), site, processes=3, needs=needs, keep=lambda item, row: rows.append((item.kind, row)))
print(json.dumps(rows))
""",
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 8 and len({row["process"] for _, row in rows}) == 3
    bank = next(row for kind, row in rows if kind == "bank")
    assert all(row["start"] >= bank["end"] for kind, row in rows if kind == "trial")


def test_a_failure_keeps_what_was_begun_and_a_dead_process_is_named(tmp_path):
    body = """
items = [Item("teacher", seed) for seed in ({bad}, 1, 2, 3, 4, 5)]
try:
    workers.perform(items, site, processes=2, needs=needs, keep=lambda item, row: rows.append(item.seed))
except RunError as error:
    print(error, rows, len(rows))
"""
    result = share(tmp_path, body.format(bad=99))
    assert result.stdout.startswith("as asked [1"), result.stderr
    result = share(tmp_path, body.format(bad=98))
    assert "the process that did teacher, seed 98 ended by itself" in result.stdout


def test_nothing_new_after_the_time(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "_doer", pretend)
    done = []
    site = Site(tmp_path, TOY, "cpu", 1)
    until = time.monotonic() + 0.3
    perform(items_of(4), site, processes=1, needs=needs, keep=lambda item, row: done.append(item), until=until)
    assert 1 <= len(done) <= 2


def test_a_process_does_not_outlive_its_parent(tmp_path):
    """Killed outright, the parent takes its processes along, which could otherwise write beside the next run's."""
    result = share(
        tmp_path,
        """
def keep(item, row):
    print(row["process"], flush=True)
    os.kill(os.getpid(), 9)
workers.perform(items_of(4), site, processes=2, needs=needs, keep=keep)
""",
    )
    process = int(result.stdout)
    until = time.monotonic() + 20
    while time.monotonic() < until and Path(f"/proc/{process}").exists():
        time.sleep(0.1)
    assert not Path(f"/proc/{process}").exists()


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match=r"experiment 'table9' does not exist; expected one of"):
        run_experiments(["table9"], tmp_path / "a")
    with pytest.raises(ConfigError, match="seed 7 is not one of"):
        run_experiments(["table3"], tmp_path / "a", seeds=(7,))
    with pytest.raises(ConfigError, match="processes is 0"):
        run_experiments(["table3"], tmp_path / "a", processes=0)
    assert not (tmp_path / "a").exists()
    (tmp_path / "experiments.json").write_text(json.dumps({"scale": "full"}))
    with pytest.raises(ConfigError, match="holds full results, not quick ones"):
        run_experiments(["table3"], tmp_path, quick=True)
