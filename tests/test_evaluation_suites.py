"""Whole evaluations: VBench and VBench-2.0 with an imitated tool, the shapes world with its real judge."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from evaluation_world import ENTRIES, FRAMES, SIZE, fake_environment, sampler, write_entries
from micro_wan import micro_pipeline

from attention_surgery import shapes
from attention_surgery.errors import ConfigError, EvaluationError, RunError
from attention_surgery.evaluation import (
    SHAPES_SAMPLING,
    VBENCH2,
    WAN_SAMPLING,
    EvaluateConfig,
    SamplingConfig,
    estimate,
    evaluate,
    read_report,
    vbench_scores,
)
from attention_surgery.evaluation.sampling import set_scheduler_
from attention_surgery.evaluation.shapes_suite import plan_shots

TINY = SamplingConfig(num_frames=FRAMES, height=SIZE, width=SIZE, num_inference_steps=2, fps=8, scheduler="own")


class Pipeline:
    """Answers like a diffusers pipeline, with clips of `draw(prompt, seed)`."""

    def __init__(self, draw):
        self.draw, self.scheduler = draw, SimpleNamespace(config={})

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, *, prompt, generator, **_):
        clips = [self.draw(text, g.initial_seed()) for text, g in zip(prompt, generator, strict=True)]
        return SimpleNamespace(frames=[clip.astype(np.float32) / 255 for clip in clips])


def noise(offset):
    return lambda: Pipeline(lambda text, seed: sampler()([text], [seed + offset])[0])


def never():
    raise AssertionError("every video is there")


@pytest.fixture
def config(tmp_path):
    return EvaluateConfig(
        suite="vbench",
        sampling=TINY,
        info=write_entries(tmp_path / "info.json"),
        python=fake_environment(tmp_path / "environment"),
        resamples=200,
    )


def test_vbench_from_prompts_to_report(tmp_path, config):
    run = tmp_path / "run"
    report = evaluate(config, run, teacher=noise(0), student=noise(7), teacher_name="Wan", student_name="15×R2")
    rows = {row.name: row for row in report.rows}
    scores = {}
    for path in (run / "student/results").glob("*_eval_results.json"):
        scores |= {name: found[0] for name, found in json.loads(path.read_text()).items()}
    assert rows["Total"].student == pytest.approx(vbench_scores(scores).total)
    assert rows["Quality"].student == pytest.approx(vbench_scores(scores).quality)
    assert rows["subject_consistency"].videos == (10, 10)
    assert rows["subject_consistency"].interval is not None and rows["scene"].interval is None
    assert read_report(run) == report
    assert evaluate(config, run, teacher=never, student=never, teacher_name="Wan", student_name="15×R2") == report
    assert len((tmp_path / "environment/calls.log").read_text().split()) == 32  # 16 dimensions, two models, once


def test_shares_then_the_rest(tmp_path, config):
    run = tmp_path / "run"
    assert estimate(config).missing == estimate(config).videos == 2 * 5 * len(ENTRIES)
    for rank in range(2):
        assert evaluate(config, run, teacher=noise(0), student=noise(7), rank=rank, world_size=2) is None
    assert estimate(config, run).missing == 0
    assert estimate(config, run).forwards == 0
    assert evaluate(config, run, teacher=never, student=never) is not None


def test_results_from_another_machine_do_without_the_tool(tmp_path, config):
    run, values = tmp_path / "run", vars(config) | {"python": None}
    without = EvaluateConfig(**values)
    with pytest.raises(EvaluationError, match="has no results for subject_consistency, background_consistency"):
        evaluate(without, run, teacher=noise(0), student=noise(7))
    report = evaluate(config, run, teacher=never, student=never)
    assert evaluate(without, run, teacher=never, student=never) == report


def test_a_video_that_the_tool_passed_over_is_named(tmp_path, config, monkeypatch):
    monkeypatch.setenv("FAKE_SKIP", "façade-4")
    with pytest.raises(
        EvaluationError, match=r"'background_consistency' lacks 1 of 5 videos, .* 'a rocky façade-4\.mp4'"
    ):
        evaluate(config, tmp_path / "run", teacher=noise(0), student=noise(7))


def test_a_folder_of_other_settings_is_refused(tmp_path, config):
    run = tmp_path / "run"
    evaluate(config, run, teacher=noise(0), student=noise(7), rank=0, world_size=2)
    other = EvaluateConfig(**vars(config) | {"seeds": (5, 6, 7, 8, 9)})
    with pytest.raises(RunError, match="was made with other seeds, plan"):
        evaluate(other, run, teacher=never, student=never)
    with pytest.raises(RunError, match="was made with other models"):
        evaluate(config, run, teacher=never, student=never, student_name="another")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(RunError, match="is not empty and holds no evaluation"):
        evaluate(config, tmp_path / "mine", teacher=never, student=never)


def test_a_part_of_the_dimensions_has_no_total(tmp_path, config):
    part = EvaluateConfig(**vars(config) | {"dimensions": ("color", "scene"), "every": 1})
    report = evaluate(part, tmp_path / "run", teacher=noise(0), student=noise(7))
    assert [row.name for row in report.rows] == ["color", "scene"]
    assert "groups and total need all dimensions and are left out" in report.notes
    assert report.settings["videos of each model"] == 15


def test_the_static_filter_decides_what_flickering_is_judged_on(tmp_path, config):
    filtered = EvaluateConfig(**vars(config) | {"dimensions": ("temporal_flickering",), "flickering_videos": 8})
    report = evaluate(filtered, tmp_path / "run", teacher=noise(0), student=noise(7))
    (row,) = report.rows
    assert row.videos == (3, 3)
    assert "teacher: temporal_flickering: 3 of 5 videos, the static ones, by VBench's filter" in report.notes
    assert len(list((tmp_path / "run/teacher/videos").iterdir())) == 8
    assert evaluate(filtered, tmp_path / "run", teacher=never, student=never) == report


def test_vbench2_from_prompts_to_report(tmp_path, config):
    entries = [
        {"prompt_en": f"{name} number {p} " + "and on " * 30 * (name == "Complex_Plot"), "dimension": [name]}
        for name in VBENCH2.dimensions
        for p in range(2)
    ]
    values = vars(config) | {"suite": "vbench2", "info": write_entries(tmp_path / "info2.json", entries)}
    report = evaluate(EvaluateConfig(**values), tmp_path / "run", teacher=noise(0), student=noise(7))
    rows = {row.name: row for row in report.rows}
    assert rows["Diversity"].videos == (2, 2) and rows["Composition"].videos == (6, 6)
    assert rows["Material"].videos == (5, 5)  # one of six could not be judged
    assert "student: Material: 1 of 6 videos could not be judged and are left out" in report.notes
    assert rows["Total"].teacher == pytest.approx(
        np.mean(
            [rows[g].teacher for g in ("Creativity", "Commonsense", "Controllability", "Human Fidelity", "Physics")]
        )
    )
    assert len(list((tmp_path / "run/teacher/videos/Diversity").iterdir())) == 40


# --- the small world -------------------------------------------------------------------------------


def world(*, wrong_color: bool = False):
    """A pipeline that draws the suite's own clips, in the student's case some of them of another caption."""
    clips = {clip.caption: clip.frames for clip in shapes.render(12, seed=800_000, split="heldout")}
    captions = list(clips)

    def draw(text, seed):
        place = captions.index(text)
        return clips[captions[(place + 1) % 12]] if wrong_color and place % 3 == 0 else clips[text]

    return lambda: Pipeline(draw)


def test_shapes_by_the_exact_judge(tmp_path):
    config = EvaluateConfig(suite="shapes", num_prompts=12, batch_size=4, resamples=500)
    report = evaluate(config, tmp_path, teacher=world(), student=world(wrong_color=True))
    rows = {row.name: row for row in report.rows}
    assert list(rows)[-3:] == ["Quality", "Semantic", "Total"]
    assert rows["Semantic"].teacher == pytest.approx(100)
    assert rows["Semantic"].interval[1] < 0  # the student is worse, and it shows
    assert rows["color"].prompts == rows["Total"].prompts == 12 and rows["color"].difference < 0
    assert [rows[name].kind for name in ("color", "Quality", "Total")] == ["dimension", "group", "total"]
    judged = [shapes.judge(clip.frames, clip.caption) for clip in shapes.render(12, seed=800_000, split="heldout")]
    assert rows["Total"].teacher == pytest.approx(100 * np.mean([scores["total"] for scores in judged]))
    assert len(list((tmp_path / "student/videos").glob("*.mp4"))) == 12
    assert evaluate(config, tmp_path, teacher=never, student=never) == report


def test_shapes_in_shares_and_with_several_seeds(tmp_path):
    config = EvaluateConfig(suite="shapes", num_prompts=4, seeds=(1, 2), resamples=100)
    for rank in (1, 0):
        evaluate(config, tmp_path, teacher=world(), student=world(), rank=rank, world_size=2)
    report = evaluate(config, tmp_path, teacher=never, student=never)
    assert {row.name: row.videos for row in report.rows}["color"] == (8, 8)
    assert {row.prompts for row in report.rows if row.name == "color"} == {4}
    row = json.loads((tmp_path / "teacher/scores-1-of-2.jsonl").read_text().splitlines()[0])
    assert (row["key"], row["seed"]) == ("0000-1", 2)


def test_damaged_scores_of_the_small_world_are_refused(tmp_path):
    config = EvaluateConfig(suite="shapes", num_prompts=3, resamples=10)
    evaluate(config, tmp_path, teacher=world(), student=world())
    log = tmp_path / "student/scores-0-of-1.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"color": 1.0', '"color": 7.0'))
    with pytest.raises(EvaluationError, match=r"'color' of clip 0000-0 is 7\.0; expected a number in \[0, 1\]"):
        evaluate(config, tmp_path, teacher=never, student=never)
    log.write_text(text.replace('"seed": 100000', '"seed": 9'))
    with pytest.raises(EvaluationError, match=r"judged clip 0001-0 as .* with seed 9; expected"):
        evaluate(config, tmp_path, teacher=never, student=never)


def test_a_part_of_the_captions_keeps_places_and_seeds():
    assert plan_shots(7, every=3) == plan_shots(7)[::3]
    with pytest.raises(EvaluationError, match="seed 4 is there more than once"):
        plan_shots(3, seeds=(4, 4))


# --- sampling and configuration --------------------------------------------------------------------


def test_the_reference_settings():
    assert (WAN_SAMPLING.guidance_scale, WAN_SAMPLING.flow_shift, WAN_SAMPLING.num_inference_steps) == (6.0, 3.0, 50)
    assert (WAN_SAMPLING.num_frames, WAN_SAMPLING.height, WAN_SAMPLING.width, WAN_SAMPLING.fps) == (81, 480, 832, 16)
    assert "过曝" in WAN_SAMPLING.negative_prompt
    assert (SHAPES_SAMPLING.num_frames, SHAPES_SAMPLING.height) == (shapes.FRAMES, shapes.HEIGHT)


def test_a_real_pipeline_gets_the_scheduler_and_samples_by_seed(tmp_path):
    pipe = micro_pipeline()
    set_scheduler_(pipe, SamplingConfig(flow_shift=8.0))
    assert pipe.scheduler.config.flow_shift == 8.0
    assert pipe.scheduler.config.prediction_type == "flow_prediction"
    sampling = SamplingConfig(num_frames=5, height=16, width=16, num_inference_steps=2, max_sequence_length=8, fps=8)
    entries = [{"prompt_en": "a red ball", "dimension": ["scene"]}]
    config = EvaluateConfig(
        suite="vbench",
        sampling=sampling,
        dimensions=("scene",),
        info=write_entries(tmp_path / "info.json", entries),
        python=fake_environment(tmp_path / "environment"),
        batch_size=3,
    )
    report = evaluate(config, tmp_path / "run", teacher=micro_pipeline, student=micro_pipeline)
    assert report.rows[0].difference == 0  # the same model, seed for seed
    files = {path.read_bytes() for path in (tmp_path / "run/teacher/videos").iterdir()}
    assert len(files) == 5


def test_the_cost_counts_both_models_and_guidance(config):
    cost = estimate(config)
    assert (cost.videos, cost.forwards) == (110, 110 * 2 * 2)
    unguided = EvaluateConfig(suite="shapes", sampling=SamplingConfig(guidance_scale=1.0), num_prompts=10)
    assert estimate(unguided).forwards == 2 * 10 * 50
    assert str(cost).startswith("evaluate: 110 videos of both models, 110 of them not there yet; 440 transformer")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"suite": "vbench3"}, ConfigError, "suite 'vbench3' does not exist"),
        ({"suite": "vbench"}, ConfigError, r"give info, the path of VBench_full_info\.json, or python"),
        ({"suite": "shapes", "gpus": ("0",)}, ConfigError, "gpus is of the suites"),
        ({"suite": "vbench", "info": "x", "dimensions": ("colour",)}, EvaluationError, "no dimension 'colour'"),
        ({"suite": "vbench2", "info": "x", "flickering_videos": 25}, ConfigError, "of suite 'vbench' only"),
        ({"suite": "vbench", "info": "x", "flickering_videos": 3}, ConfigError, "expected at least 5"),
        ({"seeds": ()}, ConfigError, "seeds is empty"),
        ({"every": 0}, ConfigError, "every is 0; expected at least 1"),
        ({"confidence": 95}, ConfigError, "confidence is 95"),
        ({"split": "test"}, ConfigError, "split 'test' does not exist"),
    ],
)
def test_bad_configurations_are_named(values, error, message):
    with pytest.raises(error, match=message):
        EvaluateConfig(**values)


@pytest.mark.parametrize("values", [{"scheduler": "ddim"}, {"flow_shift": 0.0}, {"fps": 0}])
def test_bad_sampling_is_named(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        SamplingConfig(**values)
