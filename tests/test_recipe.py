"""The whole recipe on a pipeline of toy size: one folder, stopped and started, one report; and its settings."""

import base64
import dataclasses
import html.parser
import importlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from micro_wan import micro_pipeline
from PIL import Image

import attention_surgery as asg
from attention_surgery import shapes
from attention_surgery.errors import CheckpointError, ConfigError, DataError, ModelError, RunError
from attention_surgery.evaluation import Difference, EvaluationReport
from attention_surgery.files import digest, write_json
from attention_surgery.generation import read_video, write_video
from attention_surgery.pipelines import load_pipeline
from attention_surgery.recipe import RecipeConfig, read_config, run
from attention_surgery.recipe.folder import RunFolder
from attention_surgery.recipe.sequence import judge_run
from attention_surgery.recipe.stages import base_digest, convert_stage, generate_stage, read_prompts, read_rates
from attention_surgery.report import build_report
from attention_surgery.report.figures import errors_figure
from attention_surgery.study import StudyConfig, StudyReportConfig, study_report
from attention_surgery.study.store import StudyStore
from attention_surgery.study.videos import Pair

SHAPE = "num_frames = 9\nheight = 64\nwidth = 64\nmax_sequence_length = 16\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A base pipeline, prompts, videos and a config file, all on disk."""
    folder = tmp_path_factory.mktemp("world")
    micro_pipeline().save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("a red ball\na blue ball\nred\n\n")
    (folder / "samples.txt").write_text("ball\nblue ball\nunused\n")
    rng = np.random.default_rng(0)
    for i in range(4):
        write_video(folder / "videos" / f"{i}.mp4", rng.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8), fps=8)
        (folder / "videos" / f"{i}.txt").write_text("a red ball")
    (folder / "recipe.toml").write_text(
        f"""
base = "{folder / "base"}"
prompts = "{folder / "prompts.txt"}"
videos = "{folder / "videos"}"
sample_prompts = "{folder / "samples.txt"}"
num_samples = 2
rates = [2, 4, "linear"]
budget = 0.99
dtype = "float32"
device = "cpu"
[distill]
num_trajectories = 2
num_inference_steps = 2
heldout_prompts = 1
{SHAPE}
[finetune]
batch_size = 2
max_steps = 2
heldout_videos = 1
fps = 8
{SHAPE}
[generate]
num_inference_steps = 2
negative_prompt = ""
fps = 8
{SHAPE}
"""
    )
    return folder


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(read_config(world / "recipe.toml"), folder) == folder / "report.html"
    return folder


def test_a_run_leaves_everything(finished, world):
    stages = [json.loads(line)["stage"] for line in (finished / "stages.jsonl").read_text().splitlines()]
    assert stages == [
        "profile",
        "distill",
        "select",
        "convert",
        "generate teacher",
        "generate distilled",
        "finetune",
        "generate hybrid",
    ]
    for variant in ("teacher", "distilled", "hybrid"):
        for i in range(2):
            assert read_video(finished / "videos" / variant / f"{i:04d}.mp4").shape == (9, 64, 64, 3)
    selection = json.loads((finished / "selection.json").read_text())
    assert selection["cost"] <= 0.99
    model = asg.from_pretrained(finished / "model")
    assert {str(b): r for b, r in model.hybrid_config.rates.items()} == {
        b: r for b, r in selection["rates"].items() if r != 1
    }
    pipe = load_pipeline(world / "base", dtype=torch.float32, device="cpu", transformer=model)
    assert pipe.transformer is model
    for checkpoint in ("converted", "model"):  # cards are for others: what made the model, but no path of this machine
        card = (finished / checkpoint / "README.md").read_text()
        assert "num_trajectories" in card and str(world) not in card


def test_teacher_distilled_and_hybrid_are_three_models(finished):
    videos = [read_video(finished / "videos" / v / "0000.mp4").astype(int) for v in ("teacher", "distilled", "hybrid")]
    assert not np.array_equal(videos[0], videos[1]) and not np.array_equal(videos[1], videos[2])


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.titles, self.videos, self.images, self.links, self.inside = [], [], [], [], False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "h2"
        attributes = dict(attrs)
        if tag == "video":
            self.videos.append(attributes["src"])
        if tag == "img":
            content = base64.b64decode(attributes["src"].partition(";base64,")[2])
            self.images.append(Image.open(io.BytesIO(content)).size)
        self.links += [attributes[name] for name in ("src", "href") if attributes.get(name, "").startswith("http")]

    def handle_data(self, data):
        if self.inside and data.strip():
            self.titles.append(data.strip())


def test_report_is_one_file_with_every_section(finished):
    page = Page()
    page.feed((finished / "report.html").read_text())
    assert page.links == []
    assert len(page.videos) == 6 and all(src.startswith("data:video/mp4;base64,") for src in page.videos)
    assert len(page.images) == 6 and all(size == (6 * (112 + 2) - 2, 112) for size in page.images)
    assert page.titles == [
        "Videos, same prompts and seeds",
        "Frames side by side",
        "Cost before and after",
        "Error of each block by rate, after distillation",
        "Choice of rates",
        "Distillation",
        "Fine-tuning",
        "Time of each stage",
        "How this was made",
    ]


def test_report_shows_scores_evaluations_and_studies_where_they_are(finished, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(finished, run_folder)
    means = {name: 0.5 for name in ("total", "color", "semantic", "quality")}
    difference = {name: {"value": -0.04, "interval": [-12.5, 3.0]} for name in means} | {
        "color": {"value": 1.0, "interval": None}
    }
    variants = dict.fromkeys(("teacher", "distilled", "hybrid"), means)
    write_json(run_folder / "scores.json", {"videos": 2, "variants": variants, "difference": difference})
    rows = (
        Difference(
            name="scene",
            kind="dimension",
            teacher=96.0,
            student=95.5,
            difference=-0.5,
            interval=(-1.25, 0.25),
            prompts=72,
        ),
        Difference(name="Total", kind="total", teacher=83.31, student=83.0, difference=-0.31, interval=None),
    )
    for suite in ("VBench", "Shapes"):
        report = EvaluationReport(
            suite=suite, teacher="<Wan>", student="15×R2", rows=rows, confidence=0.9, notes=("one left out",)
        )
        report.write(run_folder / f"evaluation-{suite}")
    config = StudyConfig(ours=tmp_path / "ours", baseline=tmp_path / "theirs", margin=0.2)
    pairs = [
        Pair(name=f"{i}.mp4", prompt=str(i), caption=None, dimensions=("d",), ours_digest="o", baseline_digest="b")
        for i in range(4)
    ]
    store = StudyStore.create(tmp_path / "v.sqlite", config.fixed_settings(), pairs)
    for rater in ("anna", "ben"):
        state = store.enter(rater)
        while state.question:
            state = store.vote(state.question.token, "left")
    study_report(StudyReportConfig(database=store.path, output_dir=run_folder / "study", resamples=200))

    text = build_report(run_folder).read_text().replace("\N{NO-BREAK SPACE}", " ")
    page = Page()
    page.feed(text)
    assert page.links == [] and len(page.images) == 7
    assert page.titles[2:6] == [
        "Scores of the exact judge",
        "Shapes: 15×R2 against <Wan>",
        "VBench: 15×R2 against <Wan>",
        "Blind study: ours against theirs",
    ]
    assert "+0.0 [-12.5, +3.0]" in text and "<td>+1.0</td>" in text  # no -0.0, and no interval where there is none
    assert "-0.50 [-1.25, +0.25]" in text and "90% bootstrap interval" in text and "one left out" in text
    assert "8 votes by 2 raters on 4 prompts" in text and "within the margin of ±20 points" in text
    order = [text.index(f">{name}</td>") for name in ("color", "quality", "semantic", "total")]
    assert order == sorted(order)


def test_every_rate_has_a_curve():
    errors = {"0": {str(rate): rate / 100 for rate in range(2, 10)}}
    assert errors_figure(errors, {}).count("R = ") >= 8


@pytest.mark.parametrize("content", [None, "[]", '{"base": "x"}'])
def test_report_of_a_foreign_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"no run folder|not that of a run"):
        build_report(tmp_path)


def test_a_stopped_run_goes_on_and_does_nothing_twice(world, finished, tmp_path, monkeypatch):
    """Stopped in the middle of every stage in turn; the result is that of the unbroken run."""
    module = importlib.import_module("attention_surgery.recipe.sequence")
    config, folder = read_config(world / "recipe.toml"), tmp_path / "run"
    calls = []
    for name in ("distill_stage", "select_stage", "convert_stage", "generate_stage", "finetune_stage"):
        original = getattr(module, name)

        def stopped_once(*args, original=original, name=name, **kwargs):
            result = original(*args, **kwargs)
            calls.append(name)
            if calls.count(name) == 1:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(module, name, stopped_once)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            run(config, folder)
    run(config, folder)
    assert calls.count("distill_stage") == 2 and calls.count("finetune_stage") == 2
    before = len(calls)
    run(config, folder)
    assert len(calls) == before
    one, two = asg.from_pretrained(finished / "model"), asg.from_pretrained(folder / "model")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_run_folders_are_not_mixed(world, finished, tmp_path):
    config = read_config(world / "recipe.toml")
    with pytest.raises(RunError, match=r"budget: 0\.99 → 0\.98"):
        run(dataclasses.replace(config, budget=0.98), finished)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        run(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_does_not_go_on_with_other_prompts(world, finished, tmp_path):
    """Videos of the old prompts would stand under the new ones."""
    config = dataclasses.replace(read_config(world / "recipe.toml"), sample_prompts=str(tmp_path / "samples.txt"))
    (tmp_path / "samples.txt").write_text("ball\nblue ball\n")
    run_folder = tmp_path / "run"
    RunFolder(run_folder).claim(config.to_dict() | {"lines": {}, "weights": base_digest(config.base)})
    with pytest.raises(RunError, match=r"lines\.sample_prompts"):
        run(config, run_folder)
    assert [path.name for path in run_folder.iterdir()] == ["config.json"]


def test_another_base_model_in_the_same_folder_is_refused(world, finished, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    config = dataclasses.replace(read_config(world / "recipe.toml"), base=str(tmp_path / "base"))
    lines = {name: digest(read_prompts(getattr(config, name))) for name in ("prompts", "sample_prompts")}
    before = {"lines": lines, "weights": base_digest(config.base)}
    RunFolder(tmp_path / "run").claim(config.to_dict() | before)
    micro_pipeline(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(RunError, match=r"other settings \(weights: "):
        run(config, tmp_path / "run")
    with pytest.raises(ModelError, match="distilled from other weights"):
        convert_stage(config.base, finished / "distill" / "bank", {0: 2}, tmp_path / "converted", dtype=torch.float32)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}'])
def test_damaged_and_newer_run_folders_are_named(world, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"damaged|another version"):
        run(read_config(world / "recipe.toml"), tmp_path)


def test_videos_of_other_settings_are_not_kept(world, finished, tmp_path):
    settings = read_config(world / "recipe.toml").generate
    options = {"config": settings, "dtype": torch.float32, "device": "cpu"}

    def generate(prompts, checkpoint=None, **changes):
        return generate_stage(str(world / "base"), checkpoint, prompts, tmp_path / "videos", **options | changes)

    with pytest.raises(ConfigError, match="num_frames is 8; this model takes 7 or 9"):
        generate(["ball"], config=dataclasses.replace(settings, num_frames=8))
    with pytest.raises(CheckpointError):
        (tmp_path / "none").mkdir()
        generate(["ball"], tmp_path / "none")
    assert not (tmp_path / "videos").exists()
    generate(["ball"])
    before = (tmp_path / "videos" / "0000.mp4").stat().st_mtime_ns
    generate(["ball"])
    assert (tmp_path / "videos" / "0000.mp4").stat().st_mtime_ns == before
    for change in (
        {"prompts": ["a red ball"]},
        {"prompts": ["ball"], "checkpoint": finished / "model"},
        {"prompts": ["ball"], "first_seed": 1},
        {"prompts": ["ball"], "config": dataclasses.replace(settings, guidance_scale=1.0)},
    ):
        with pytest.raises(RunError, match="made with other settings"):
            generate(**change)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rates": {"a": 2}}', '{"rates": {"0": 0}}'])
def test_a_choice_that_is_none_is_named(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(DataError, match=r"s\.json is no choice of rates"):
        read_rates(tmp_path / "s.json")


def test_loading_takes_the_transformer_that_is_passed(world):
    pipe = micro_pipeline()
    asg.convert_(pipe.transformer, asg.HybridConfig({0: 2}))
    loaded = load_pipeline(world / "base", dtype=torch.float32, device="cpu", transformer=pipe.transformer)
    assert loaded.transformer is pipe.transformer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bse = 'x'", "entry 'bse' does not exist"),
        ("[distill]\nsteps = 5", r"\[distill\]: entry 'steps' does not exist"),
        ("budget = 'half'", "budget is 'half'"),
        ("budget = 1.5", r"budget is 1\.5"),
        ("rates = [0]", "rate 0 does not exist"),
        ("distill = 5", "expected a table"),
        ("base = 'elsewhere'", "prompts is not set"),
        ("[finetune]\nlr = -1", "lr is -1"),
        ("not toml", "no readable TOML"),
    ],
)
def test_config_faults_are_named(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "c.toml")


def test_config_reads_every_field_and_its_defaults(tmp_path):
    (tmp_path / "c.toml").write_text('rates = [2, "linear"]\n[finetune]\nlr = 1\nvalidation_prompts = ["a"]\n')
    config = read_config(tmp_path / "c.toml")
    assert config.rates == (2, "linear") and config.finetune.lr == 1.0
    assert config.finetune.validation_prompts == ("a",)
    assert config.distill == RecipeConfig().distill


def test_prompts_that_are_none(world, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    config = dataclasses.replace(read_config(world / "recipe.toml"), prompts=str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="holds no prompts"):
        run(config, tmp_path / "run")


def test_unknown_types_are_refused(tmp_path):
    (tmp_path / "c.toml").write_text("num_samples = 2.5")
    with pytest.raises(ConfigError, match=r"num_samples is 2\.5"):
        read_config(tmp_path / "c.toml")


def test_the_small_world_judges_the_videos_of_a_run(tmp_path):
    """The hybrid shows the clips of other captions: fewer marks, with an interval over the prompts."""
    clips = shapes.render(4, seed=5)
    shown = {"teacher": clips, "distilled": clips, "hybrid": [*clips[1:], clips[0]]}
    for variant, row in shown.items():
        for i, clip in enumerate(row):
            write_video(tmp_path / "videos" / variant / f"{i:04d}.mp4", clip.frames, fps=8)
    semantic = judge_run(tmp_path, [clip.caption for clip in clips])
    assert semantic["teacher"] == semantic["distilled"] == 1 and semantic["hybrid"] < 0.8
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["videos"] == 4 and written["variants"]["hybrid"]["semantic"] == semantic["hybrid"]
    found = written["difference"]["semantic"]
    assert found["value"] == pytest.approx(100 * (semantic["hybrid"] - 1))
    assert found["interval"][0] < found["value"] < found["interval"][1] < 0
