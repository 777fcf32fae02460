"""Prompt lists, names, seeds, shares, resuming, and what a folder of videos must be."""

from collections import Counter

import pytest
from evaluation_world import ENTRIES, FRAMES, fake_environment, sampler, write_entries

from attention_surgery.errors import EvaluationError
from attention_surgery.evaluation import VBENCH, VBENCH2
from attention_surgery.evaluation.prompts import Prompt, find_info, read_info, read_prompts, select_entries
from attention_surgery.evaluation.videos import check_videos, count_frames, generate_videos, missing_videos, plan_videos
from attention_surgery.generation import read_video

LONG = "a king who " + "walks " * 40 + "home"


def lines(path, texts):
    path.write_text("\n".join(texts) + "\n")
    return path


def files(plan):
    return [file for video in plan for file in video.files]


# --- prompts ---------------------------------------------------------------------------------------


def test_the_official_list_names_and_seeds_the_videos(tmp_path):
    entries = read_info(write_entries(tmp_path / "info.json"), VBENCH)
    prompts = read_prompts(entries, VBENCH)
    plan = plan_videos(VBENCH, prompts)
    assert [prompt.text for prompt in prompts] == [entry["prompt_en"] for entry in ENTRIES]
    assert files(plan)[5:10] == [f"a dog-{i}.mp4" for i in range(5)]
    assert [video.seed for video in plan[5:10]] == [100_000, 100_001, 100_002, 100_003, 100_004]


def test_augmented_prompts_are_given_but_do_not_name(tmp_path):
    texts = [entry["prompt_en"] for entry in ENTRIES]
    originals = lines(tmp_path / "all_dimension.txt", reversed(texts))
    augmented = lines(tmp_path / "aug.txt", [f"In detail: {text}" for text in reversed(texts)])
    prompts = read_prompts(ENTRIES, VBENCH, originals=originals, augmented=augmented)
    dog = next(video for video in plan_videos(VBENCH, prompts) if video.files == ("a dog-3.mp4",))
    assert dog.prompt == "In detail: a dog"
    assert dog.seed == 100_000 * 9 + 3  # the place in the list that was augmented
    in_order = lines(tmp_path / "in_order.txt", [text.upper() for text in texts])
    assert [p.sampled for p in read_prompts(ENTRIES, VBENCH, augmented=in_order)] == [text.upper() for text in texts]


def test_of_a_repeated_prompt_the_last_counts(tmp_path):
    entries = [*ENTRIES, {"prompt_en": "a dog", "dimension": ["object_class"]}]
    texts = [entry["prompt_en"] for entry in entries]
    augmented = lines(tmp_path / "aug.txt", [f"{i}: {text}" for i, text in enumerate(texts)])
    dog = next(p for p in read_prompts(entries, VBENCH, augmented=augmented) if p.text == "a dog")
    assert (dog.sampled, dog.index) == ("11: a dog", 11)
    assert dog.dimensions == ("subject_consistency", "dynamic_degree", "motion_smoothness", "object_class")


@pytest.mark.parametrize(
    ("originals", "augmented", "message"),
    [
        (None, ["one", "two"], r"aug\.txt has 2 prompts, VBench's list 11"),
        (["a dog", "a bus", "a cat"], ["one", "two"], r"originals\.txt has 3 prompts but .*aug\.txt has 2"),
        (["a dog", "a bus"], ["one", "two"], r"originals\.txt lacks 9 of the prompts, the first of them 'In a still"),
    ],
)
def test_lists_that_do_not_match_are_refused(tmp_path, originals, augmented, message):
    first = lines(tmp_path / "originals.txt", originals) if originals else None
    with pytest.raises(EvaluationError, match=message):
        read_prompts(ENTRIES, VBENCH, originals=first, augmented=lines(tmp_path / "aug.txt", augmented))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as VBench's list of prompts"),
        ("{}", r"holds no prompts; expected VBench's VBench_full_info\.json"),
        ('[{"prompt_en": "a dog"}]', "entry 0 of .* expected text in prompt_en and dimension"),
        ('[{"prompt_en": "a dog", "dimension": ["Human_Clothes"]}]', "dimension 'Human_Clothes', which VBench has not"),
        ('[{"prompt_en": "a/b", "dimension": ["color"]}]', "'a/b', cannot name a file"),
    ],
)
def test_foreign_lists_of_prompts_are_refused(tmp_path, text, message):
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_info(tmp_path / "info.json", VBENCH)


def test_a_part_keeps_the_seeds_of_the_whole():
    whole = {video.files: video for video in plan_videos(VBENCH, read_prompts(ENTRIES, VBENCH))}
    kept = select_entries(ENTRIES, VBENCH, dimensions=["color"])
    assert [entry["prompt_en"] for entry in kept] == ["a red car", "a blue car"]
    assert [entry["prompt_en"] for entry in select_entries(ENTRIES, VBENCH, dimensions=["color"], every=2)] == [
        "a red car"
    ]
    texts = {entry["prompt_en"] for entry in kept}
    prompts = [prompt for prompt in read_prompts(ENTRIES, VBENCH) if prompt.text in texts]
    for video in plan_videos(VBENCH, prompts):
        assert whole[video.files] == video
    with pytest.raises(EvaluationError, match=r"no prompt is left for .*temporal_style"):
        select_entries(ENTRIES, VBENCH, every=11)


def test_the_list_is_found_in_an_installed_package(tmp_path):
    python = fake_environment(tmp_path)
    with pytest.raises(EvaluationError, match=r"VBench_full_info\.json does not exist"):
        find_info(python, VBENCH)
    info = write_entries(tmp_path / "site/vbench/VBench_full_info.json")
    assert find_info(python, VBENCH) == info
    with pytest.raises(EvaluationError, match="does not run as a Python interpreter"):
        find_info(tmp_path / "nothing", VBENCH)
    (tmp_path / "site/vbench2/__init__.py").unlink()
    (tmp_path / "site/vbench2").rmdir()
    with pytest.raises(EvaluationError, match="has no package 'vbench2'"):
        find_info(python, VBENCH2)


# --- the plan --------------------------------------------------------------------------------------


def test_vbench2_lies_in_folders_under_shortened_names():
    prompts = [
        Prompt(text=LONG, sampled=LONG, dimensions=("Complex_Plot",), index=0),
        Prompt(text="two people", sampled="two people", dimensions=("Human_Clothes", "Human_Anatomy"), index=1),
        Prompt(text="a river", sampled="a river", dimensions=("Diversity", "Dynamic_Attribute"), index=2),
    ]
    plan = plan_videos(VBENCH2, prompts)
    assert plan[0].files == (f"Complex_Plot/{LONG[:180]}-0.mp4",)
    assert plan[3].files == ("Human_Clothes/two people-0.mp4", "Human_Anatomy/two people-0.mp4")  # made once
    assert Counter(file.split("/")[0] for file in files(plan)) == {
        "Complex_Plot": 3,
        "Human_Clothes": 3,
        "Human_Anatomy": 3,
        "Diversity": 20,
        "Dynamic_Attribute": 3,
    }
    assert len(plan) == 3 + 3 + 20


def test_prompts_that_would_share_a_file_are_refused():
    prompts = [
        Prompt(text=LONG + end, sampled=LONG + end, dimensions=("Complex_Plot",), index=i) for i, end in enumerate("xy")
    ]
    with pytest.raises(EvaluationError, match=r"two prompts would be written to 'Complex_Plot/a king"):
        plan_videos(VBENCH2, prompts)


@pytest.mark.parametrize(
    ("seeds", "stride", "message"),
    [
        ((1, 2, 3, 2, 5), 0, r"seed 2 is there more than once in \(1, 2, 3, 2, 5\)|seed 2 is there more than once"),
        ((1, 2, 3), 0, "3 seeds do not do for 5 videos per prompt; give 5"),
        ((0, 1, 2, 3, -4), 0, "expected none below 0"),
        ((0, 1, 2, 3, 10), 10, "seed 10 reaches into the next prompt's"),
    ],
)
def test_bad_seeds_are_named(seeds, stride, message):
    with pytest.raises(EvaluationError, match=message):
        plan_videos(VBENCH, read_prompts(ENTRIES, VBENCH), seeds=seeds, stride=stride)


def test_more_videos_for_flickering_do_not_change_the_others():
    prompts = read_prompts(ENTRIES, VBENCH)
    few, many = plan_videos(VBENCH, prompts), plan_videos(VBENCH, prompts, samples={"temporal_flickering": 25})
    assert len(many) == len(few) + 20
    assert {video.files: video.seed for video in few}.items() <= {video.files: video.seed for video in many}.items()


# --- making and checking ---------------------------------------------------------------------------


@pytest.fixture
def plan():
    return plan_videos(VBENCH, read_prompts(ENTRIES[:3], VBENCH))


def test_shares_are_complete_disjoint_and_independent_of_the_batch(tmp_path, plan):
    made: list = []
    for rank in range(3):
        generate_videos(lambda: sampler(made), plan, tmp_path / "a", fps=8, batch_size=2, rank=rank, world_size=3)
    assert Counter(made) == Counter((video.prompt, video.seed) for video in plan)
    check_videos(plan, tmp_path / "a", num_frames=FRAMES)
    generate_videos(sampler, plan, tmp_path / "b", fps=8, batch_size=4)
    for file in files(plan):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_stopped_run_goes_on_and_a_finished_one_loads_nothing(tmp_path, plan):
    made: list = []

    def interrupted(prompts, seeds):
        if len(made) == 7:
            raise KeyboardInterrupt
        return sampler(made)(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        generate_videos(lambda: interrupted, plan, tmp_path, fps=8)
    assert len(missing_videos(plan, tmp_path)) == len(plan) - 7
    assert generate_videos(lambda: sampler(made), plan, tmp_path, fps=8) == len(plan) - 7
    assert Counter(made) == Counter((video.prompt, video.seed) for video in plan)

    def load():
        raise AssertionError("nothing is missing")

    assert generate_videos(load, plan, tmp_path, fps=8) == 0


def test_a_video_is_copied_under_its_other_names(tmp_path):
    prompt = Prompt(text="two people", sampled="x", dimensions=("Human_Clothes", "Human_Anatomy"), index=0)
    plan = plan_videos(VBENCH2, [prompt])
    generate_videos(sampler, plan, tmp_path, fps=8)
    (tmp_path / "Human_Anatomy/two people-1.mp4").unlink()
    assert generate_videos(sampler, plan, tmp_path, fps=8) == 0  # copied, not made
    one, other = (read_video(tmp_path / name / "two people-1.mp4") for name in ("Human_Clothes", "Human_Anatomy"))
    assert (one == other).all()


def test_ranks_outside_the_world_are_refused(tmp_path, plan):
    with pytest.raises(EvaluationError, match=r"rank 3 of 3 processes does not exist; expected 0 to 2"):
        generate_videos(sampler, plan, tmp_path, fps=8, rank=3, world_size=3)


def test_missing_surplus_and_broken_videos_are_named(tmp_path, plan):
    generate_videos(sampler, plan, tmp_path, fps=8)
    victim = tmp_path / "a dog-2.mp4"
    whole = victim.read_bytes()
    victim.unlink()
    with pytest.raises(EvaluationError, match=r"lacks 1 of 15 videos, the first of them 'a dog-2\.mp4'"):
        check_videos(plan, tmp_path)
    victim.write_bytes(whole[: len(whole) // 2])
    for check in (
        lambda: check_videos(plan, tmp_path),
        lambda: generate_videos(sampler, plan, tmp_path, fps=8),
        lambda: count_frames(victim),
    ):
        with pytest.raises(EvaluationError, match=r"a dog-2\.mp4 is no readable video .* delete it and generate"):
            check()
    victim.write_bytes(whole)
    (tmp_path / "a dog-5.mp4").write_bytes(whole)
    with pytest.raises(EvaluationError, match=r"holds 1 files that are no videos .* 'a dog-5\.mp4'"):
        check_videos(plan, tmp_path)
    (tmp_path / "a dog-5.mp4").unlink()
    with pytest.raises(EvaluationError, match="has 5 frames; expected 81"):
        check_videos(plan, tmp_path, num_frames=81)
