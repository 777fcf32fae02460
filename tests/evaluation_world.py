"""Small stand-ins for an evaluation's tests: a list of prompts, a sampler, and an official tool's environment."""

import json
import os
import sys
from pathlib import Path

import numpy as np

FRAMES, SIZE = 5, 16

FAKE_VBENCH = '''
"""Imitates the official package: same entry, same files, scores from the videos' sizes in bytes."""
import json, os, pathlib

SKIP = os.environ.get("FAKE_SKIP", "")


class VBench:
    per_prompt = 5

    def __init__(self, device, info, output):
        assert device == "cuda"
        self.info, self.output = json.loads(pathlib.Path(info).read_text()), pathlib.Path(output)

    def evaluate(self, videos_path, name, dimension_list):
        (dimension,) = dimension_list
        print("judging", dimension, "on", os.environ.get("CUDA_VISIBLE_DEVICES"))
        with open(os.environ["FAKE_LOG"], "a") as log:
            print(dimension, file=log)
        if dimension == os.environ.get("FAKE_CRASH"):
            raise RuntimeError("CUDA out of memory while judging")
        if dimension == os.environ.get("FAKE_SILENT"):
            return
        names = sorted(os.listdir(videos_path))
        results = []
        for entry in self.info:
            if dimension in entry["dimension"]:
                for i in range(20 if dimension == "Diversity" else self.per_prompt):
                    video = f"{entry['prompt_en'][:180]}-{i}.mp4"
                    if video in names and not (SKIP and SKIP in video):
                        value = os.path.getsize(os.path.join(videos_path, video)) % 97 / 97
                        results.append({"video_path": os.path.join(videos_path, video), "video_results": value})
                if dimension == "Diversity":
                    del results[-19:]
        score = sum(item["video_results"] for item in results) / len(results)
        if dimension == "imaging_quality":
            for item in results:
                item["video_results"] *= 100
        if dimension == "Material":
            results[0]["video_results"] = -1
        file = self.output / f"{name}_eval_results.json"
        file.write_text(json.dumps({dimension: [score, results]}))


class VBench2(VBench):
    per_prompt = 3
'''

FAKE_CLI = """
import os, pathlib, shutil, sys


def main():
    videos, result = sys.argv[3], pathlib.Path(sys.argv[5])
    assert sys.argv[1:3] == ["static_filter", "--videos_path"] and sys.argv[4] == "--result_path"
    (result / "filtered_videos").mkdir(parents=True)
    for i, name in enumerate(sorted(n for n in os.listdir(videos) if n.startswith("In a still frame"))[1:4]):
        shutil.copy(os.path.join(videos, name), result / "filtered_videos" / f"In a still frame, a stop sign-{i}.mp4")
"""

ENTRIES = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a dog", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness", "object_class"]},
    {"prompt_en": 'a cat; and "two" $birds', "dimension": ["multiple_objects", "spatial_relationship"]},
    {"prompt_en": "A person is running", "dimension": ["human_action"]},
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a rocky façade", "dimension": ["scene", "background_consistency"]},
    {"prompt_en": "a fantasy landscape", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    {"prompt_en": "a beach, watercolor painting", "dimension": ["appearance_style"]},
    {"prompt_en": "a beach, zoom in", "dimension": ["temporal_style"]},
    {"prompt_en": "a bus", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness", "object_class"]},
    {"prompt_en": "a blue car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "blue"}}},
]


def write_entries(path: Path, entries=ENTRIES) -> Path:
    path.write_text(json.dumps(entries))
    return path


def sampler(made: list | None = None):
    """Clips that depend on prompt and seed alone; `made` collects what was asked for."""

    def sample(prompts, seeds):
        if made is not None:
            made.extend(zip(prompts, seeds, strict=True))
        clips = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng([seed, len(prompt)])
            clips.append(rng.integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8))
        return clips

    return sample


def fake_environment(folder: Path) -> Path:
    """An interpreter with a fake vbench, vbench2 and torch, like the official tool's own environment."""
    for package in ("vbench", "vbench2", "torch", "vbench/cli"):
        (folder / "site" / package).mkdir(parents=True, exist_ok=True)
    (folder / "site/torch/__init__.py").write_text("def device(name): return name\n")
    (folder / "site/vbench/__init__.py").write_text(FAKE_VBENCH)
    (folder / "site/vbench2/__init__.py").write_text("from vbench import VBench2\n")
    (folder / "site/vbench/cli/__init__.py").write_text("")
    (folder / "site/vbench/cli/vbench.py").write_text(FAKE_CLI)
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nexport FAKE_LOG="${{FAKE_LOG:-{folder / "calls.log"}}}"\n'
        f'PYTHONPATH="{folder / "site"}" exec "{sys.executable}" "$@"\n'
    )
    os.chmod(python, 0o755)
    return python
