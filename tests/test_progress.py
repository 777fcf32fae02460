"""The progress bar: on a terminal it says how much time is left; elsewhere it is silent."""

import dataclasses
import io

import pytest
from micro_wan import micro_pipeline
from rich.console import Console
from test_distillation import CONFIG, PROMPTS

from attention_surgery import progress
from attention_surgery.distillation import distill


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def console(request, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=request.param, width=160)
    monkeypatch.setattr(progress, "console", console)
    return console


def test_time_left_and_note(console):
    with progress.progress("fine-tune", 4, done=1) as advance:
        advance("loss 0.5000")
        advance("loss 0.2500")
    said = console.file.getvalue()
    if not console.is_terminal:
        assert said == ""
        return
    assert all(words in said for words in ("fine-tune", "3/4", "left", "loss 0.2500"))


def test_distillation_counts_denoising_steps(console):
    """A trajectory of a large model takes minutes; the bar moves within it."""
    config = dataclasses.replace(CONFIG, num_trajectories=2)
    distill(micro_pipeline(), PROMPTS, (2,), config=config, blocks=[0])
    said = console.file.getvalue()
    assert ("6/6" in said and "loss " in said) if console.is_terminal else said == ""
