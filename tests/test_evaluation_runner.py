"""The official tools in their own environment, and the files that they write."""

import json
import math
from pathlib import Path

import pytest
from evaluation_world import ENTRIES, fake_environment, sampler

from attention_surgery.errors import EvaluationError
from attention_surgery.evaluation import VBENCH, VBENCH2, read_results, setup_commands
from attention_surgery.evaluation.prompts import Prompt, read_prompts
from attention_surgery.evaluation.results import collect_results, expected_files, values_by_prompt
from attention_surgery.evaluation.runner import run_official
from attention_surgery.evaluation.videos import generate_videos, plan_videos

DIMENSIONS = ("subject_consistency", "color", "imaging_quality")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    generate_videos(sampler, plan_videos(VBENCH, read_prompts(ENTRIES, VBENCH)), folder, fps=8)
    return folder


@pytest.fixture
def python(tmp_path):
    return fake_environment(tmp_path / "environment")


def run(python, videos, results, dimensions=DIMENSIONS, **options):
    run_official(VBENCH, python, ENTRIES, dict.fromkeys(dimensions, videos), results, **options)


def calls(python: Path) -> list[str]:
    return (python.parent / "calls.log").read_text().split()


# --- running ---------------------------------------------------------------------------------------


def test_every_dimension_is_judged_once(tmp_path, python, videos):
    run(python, videos, tmp_path / "results", DIMENSIONS[:2])
    run(python, videos, tmp_path / "results", gpus=("0", "1"))
    assert sorted(calls(python)) == sorted(DIMENSIONS)
    assert "judging imaging_quality on 0" in (tmp_path / "results/logs/imaging_quality.log").read_text()
    found = collect_results(tmp_path / "results", VBENCH, DIMENSIONS)
    expected = expected_files(VBENCH, read_prompts(ENTRIES, VBENCH))
    for name, result in found.items():
        values = values_by_prompt(result, VBENCH, expected[name])
        every = [value for row in values.values() for value in row]
        assert result.score == pytest.approx(sum(every) / len(every))
        assert all(len(row) == 5 for row in values.values())
    size = (videos / "a dog-3.mp4").stat().st_size
    assert dict(found["subject_consistency"].videos)["a dog-3.mp4"] == pytest.approx(size % 97 / 97)


def test_a_failing_tool_says_why_and_keeps_what_is_done(tmp_path, python, videos, monkeypatch):
    monkeypatch.setenv("FAKE_CRASH", "color")
    with pytest.raises(EvaluationError, match=r"(?s)status 1; the end of .*color\.log:.*CUDA out of memory while judg"):
        run(python, videos, tmp_path / "results")
    monkeypatch.delenv("FAKE_CRASH")
    run(python, videos, tmp_path / "results")
    assert calls(python) == ["subject_consistency", "color", "color", "imaging_quality"]
    assert not list((tmp_path / "results").glob(".*"))


def test_a_tool_that_writes_nothing_is_an_error(tmp_path, python, videos, monkeypatch):
    monkeypatch.setenv("FAKE_SILENT", "color")
    with pytest.raises(EvaluationError, match=r"ended without an error but wrote no color_eval_results\.json"):
        run(python, videos, tmp_path / "results", ("color",))


def test_an_interpreter_that_is_none(tmp_path, videos):
    with pytest.raises(EvaluationError, match=r"nowhere cannot be run: .*; give the environment's interpreter"):
        run(tmp_path / "nowhere", videos, tmp_path / "results", ("color",))


def test_results_of_other_videos_are_not_taken_over(tmp_path, python):
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(5):
        (folder / f"a red car-{i}.mp4").write_bytes(b"x" * (i + 1))
    run(python, folder, tmp_path / "results", ("color",))
    (folder / "a red car-4.mp4").write_bytes(b"other")
    run(python, folder, tmp_path / "results", ("color",))  # as long as the size is the same, nothing is seen
    (folder / "a red car-4.mp4").write_bytes(b"another")
    with pytest.raises(EvaluationError, match="was judged on other prompts or videos; delete it"):
        run(python, folder, tmp_path / "results", ("color",))


def test_vbench2_is_run_per_folder(tmp_path, python):
    entries = [{"prompt_en": "glass breaks " * 20, "dimension": ["Material"], "auxiliary_info": "?"}]
    prompts = [Prompt(text="glass breaks " * 20, sampled="x", dimensions=("Material",), index=0)]
    generate_videos(sampler, plan_videos(VBENCH2, prompts), tmp_path / "videos", fps=8)
    run_official(VBENCH2, python, entries, {"Material": tmp_path / "videos/Material"}, tmp_path / "results")
    result = collect_results(tmp_path / "results", VBENCH2, ["Material"])["Material"]
    (values,) = values_by_prompt(result, VBENCH2, expected_files(VBENCH2, prompts)["Material"]).values()
    assert len(values) == 2  # one of three is -1: the video did not show it


@pytest.mark.parametrize(("suite", "package"), [(VBENCH, "vbench==0.1.5"), (VBENCH2, "vbench2==0.1.1")])
def test_setup_commands_pin_the_package(suite, package):
    text = setup_commands(suite, "/opt/judge")
    assert package in text and "/opt/judge/bin/pip" in text and "{" not in text


# --- reading ---------------------------------------------------------------------------------------


def write(path: Path, document) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def rows(count: int = 5, value: float = 0.5, prompt: str = "a red car") -> list[dict]:
    return [{"video_path": f"/gpu/videos/{prompt}-{i}.mp4", "video_results": value} for i in range(count)]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("not json", "cannot be read as VBench's results"),
        ([], "is no result file of VBench"),
        ({"i2v_subject": [0.9, []]}, "VBench has no dimension 'i2v_subject': the file is another benchmark's"),
        ({"Human_Clothes": [0.9, []]}, "VBench has no dimension 'Human_Clothes'"),
        ({"color": 0.8}, "'color' is not .score, videos.: the file is of another version"),
        ({"color": [0.8, [["a red car-0.mp4", 0.5]]]}, "expected video_path and video_results"),
        ({"color": [81.3, rows()]}, r"'color' is 81\.3; expected a number in \[0, 1\]"),
        ({"color": [math.nan, rows()]}, "'color' is nan"),
        ({"color": [0.5, rows(value=1.5)]}, r"'a red car-0\.mp4': VBench: 'color' is 1\.5"),
        ({"imaging_quality": [0.5, rows(value=130)]}, r"'imaging_quality' is 130; expected a number in \[0, 100\]"),
        ({"imaging_quality": [65.2, rows(value=65)]}, r"'imaging_quality' is 65\.2; expected a number in \[0, 1\]"),
    ],
)
def test_foreign_and_damaged_result_files_are_refused(tmp_path, document, message):
    path = write(tmp_path / "x_eval_results.json", document)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_results(path, VBENCH)
    assert str(path) in str(caught.value)


def test_a_result_file_that_is_not_there(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read as VBench's results"):
        read_results(tmp_path / "none.json", VBENCH)


def test_results_in_two_files_or_in_none(tmp_path):
    write(tmp_path / "a_eval_results.json", {"color": [0.5, rows()]})
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper/b_eval_results.json", {"scene": [0.5, rows()]})
    assert list(collect_results(tmp_path, VBENCH, ["scene", "color"])) == ["scene", "color"]
    with pytest.raises(EvaluationError, match="no results for human_action of VBench"):
        collect_results(tmp_path, VBENCH, ["scene", "human_action"])
    write(tmp_path / "deeper/c_eval_results.json", {"color": [0.5, rows()]})
    with pytest.raises(EvaluationError, match=r"'color' is in .*a_eval_results\.json and in .*c_eval_results\.json"):
        collect_results(tmp_path, VBENCH, ["color"])


def test_values_are_in_the_unit_of_the_score(tmp_path):
    document = {"imaging_quality": [0.65, rows(value=65.0)], "dynamic_degree": [1.0, rows(value=True)]}
    found = read_results(write(tmp_path / "x.json", document), VBENCH)
    assert [value for _, value in found["imaging_quality"].videos] == [0.65] * 5
    assert [value for _, value in found["dynamic_degree"].videos] == [1.0] * 5


def test_a_missing_video_is_named_unless_the_dimension_may_leave_it_out(tmp_path):
    names = {f"a red car-{i}.mp4": "a red car" for i in range(5)}
    document = {"color": [0.5, rows(3)], "scene": [0.5, rows(3)]}
    found = read_results(write(tmp_path / "x.json", document), VBENCH)
    assert values_by_prompt(found["color"], VBENCH, names) == {"a red car": [0.5] * 3}  # no car seen in two
    with pytest.raises(EvaluationError, match=r"'scene' lacks 2 of 5 videos, the first of them 'a red car-3\.mp4'"):
        values_by_prompt(found["scene"], VBENCH, names)
    with pytest.raises(EvaluationError, match=r"a result for 'a red car-0\.mp4', which is no video of this evaluation"):
        values_by_prompt(found["scene"], VBENCH, {"a blue car-0.mp4": "a blue car"})


def test_a_dimension_that_judged_nothing_is_refused(tmp_path):
    found = read_results(write(tmp_path / "x.json", {"Material": [0, rows(3, -1)]}), VBENCH2)
    names = {f"a red car-{i}.mp4": "a red car" for i in range(3)}
    with pytest.raises(EvaluationError, match="'Material' has no value for any video"):
        values_by_prompt(found["Material"], VBENCH2, names)
    with pytest.raises(EvaluationError, match="'Composition' is -1"):
        read_results(write(tmp_path / "y.json", {"Composition": [0, rows(3, -1)]}), VBENCH2)


def test_diversity_has_one_result_per_prompt():
    prompts = [Prompt(text="a river", sampled="x", dimensions=("Diversity", "Dynamic_Attribute"), index=0)]
    expected = expected_files(VBENCH2, prompts)
    assert list(expected["Diversity"]) == ["a river-0.mp4"]
    assert len(expected["Dynamic_Attribute"]) == 3
