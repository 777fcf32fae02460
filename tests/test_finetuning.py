"""Fine-tuning: data, cache, objectives, exact resume, processes, bad input."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from micro_wan import micro_pipeline
from processes import NO_GPU, launch_two_processes
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import attention_surgery as asg
from attention_surgery.errors import CheckpointError, ConfigError, DataError, DivergenceError, ModelError, RunError
from attention_surgery.files import read_jsonl
from attention_surgery.finetuning import FinetuneConfig, finetune, read_dataset
from attention_surgery.finetuning.cache import LatentCache
from attention_surgery.finetuning.compilation import compiled_blocks
from attention_surgery.finetuning.dataset import load_clip
from attention_surgery.finetuning.objective import first_bad_block, teacher_velocity, training_loss, velocity_of
from attention_surgery.generation import write_video

CONFIG = FinetuneConfig(
    batch_size=2,
    max_steps=6,
    num_frames=5,
    height=32,
    width=32,
    fps=8,
    heldout_videos=2,
    evaluate_every=3,
    checkpoint_every=2,
    max_sequence_length=16,
    lr=1e-3,
)
RATES = {0: 2, 2: 4}


def write_clips(folder: Path, count: int = 6, frames: int = 9, fps: int = 8) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        clip = rng.integers(0, 255, (frames, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(folder / f"{i}.mp4", clip, fps=fps)
        (folder / f"{i}.txt").write_text("a red ball" if i % 2 else "a blue ball")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_clips(folder)
    return folder


def converted():
    pipe = micro_pipeline()
    torch.manual_seed(1)
    asg.convert_(pipe.transformer, asg.HybridConfig(RATES))
    return pipe


def weights(pipe) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in pipe.transformer.state_dict().items()}


# --- data -------------------------------------------------------------------------------------------------------------


def _metadata(folder: Path, layout: str, files: list[str]) -> None:
    rows = [{"file_name": file, "text": f"caption {file}"} for file in files]
    if layout == "csv":
        lines = ["file_name,text", *(f'{row["file_name"]},"{row["text"]}, with a comma"' for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))
    elif layout == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif layout == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")
    elif layout == "pairs":
        for row in rows:
            (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    elif layout == "lists":
        (folder / "videos.txt").write_text("\n".join(files))
        (folder / "prompt.txt").write_text("\n".join(row["text"] for row in rows))
    elif layout == "videos2caption":
        rows = [{"path": row["file_name"], "cap": [row["text"]]} for row in rows]
        (folder / "videos2caption.json").write_text(json.dumps(rows))
    else:
        lines = ["video,prompt", *(f"{row['file_name']},{row['text']}" for row in rows)]
        (folder / "train.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("layout", ["csv", "jsonl", "parquet", "pairs", "lists", "videos2caption", "video,prompt"])
def test_dataset_layouts(tmp_path, layout):
    for name in ("b.mp4", "a.mp4"):
        (tmp_path / name).write_bytes(b"x")
    _metadata(tmp_path, layout, ["a.mp4", "b.mp4"])
    entries = read_dataset(tmp_path)
    assert [entry.path.name for entry in entries] == ["a.mp4", "b.mp4"]
    assert all(entry.caption.startswith(f"caption {entry.path.name}") for entry in entries)


def test_dataset_faults_are_named(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        read_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match="no captioned videos"):
        read_dataset(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.mp4 has no caption"):
        read_dataset(tmp_path)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(DataError, match=r"1 of 1 videos cannot be used: the caption of a\.mp4 is empty"):
        read_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": "x"}\n')
    with pytest.raises(DataError, match=r"1 of 1 videos cannot be used: b\.mp4 does not exist"):
        read_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"clip": "b.mp4", "text": "x"}\n')
    with pytest.raises(DataError, match=r"row 1 of metadata\.jsonl names no video: it has \['clip', 'text'\]"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", b'{"file_name": "a.mp4", "text": '),
        ("metadata.jsonl", b'{"file_name": "a.mp4", "text": "\xff"}\n'),
        ("metadata.csv", b"file_name,text\na.mp4,\xff\n"),
        ("metadata.parquet", b"PAR1 no parquet"),
        ("videos2caption.json", b"{}"),
        ("videos2caption.json", b"[{]"),
    ],
)
def test_an_index_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_dataset(tmp_path)


def test_captions_that_are_wrong_stop_or_are_skipped_on_request(tmp_path, caplog):
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_text("a red ball")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "c.txt").write_text("\n")
    named = (
        r"3 of 4 videos cannot be used: a\.mp4 has no caption.*; b\.txt is no UTF-8.*; the caption of c\.mp4 is empty"
    )
    with pytest.raises(DataError, match=named):
        read_dataset(tmp_path)
    assert [entry.path.name for entry in read_dataset(tmp_path, skip_bad=True)] == ["d.mp4"]
    assert "skipped 3 of 4" in caplog.text
    (tmp_path / "d.txt").unlink()
    with pytest.raises(DataError, match="4 of 4"):
        read_dataset(tmp_path, skip_bad=True)


def test_captions_may_have_line_breaks(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.mp4,"a red ball\nrolls"\n')
    assert read_dataset(tmp_path)[0].caption == "a red ball\nrolls"


def test_clips_keep_their_speed_and_say_what_is_left(tmp_path):
    frames = np.repeat(np.arange(16, dtype=np.uint8)[:, None, None, None] * 15, 32, 1).repeat(48, 2).repeat(3, 3)
    write_video(tmp_path / "v.mp4", frames, fps=8)
    same = load_clip(tmp_path / "v.mp4", num_frames=5, height=32, width=32, fps=8)
    assert same.frames.shape == (5, 32, 32, 3)
    assert np.abs(same.frames.mean(axis=(1, 2, 3)) - np.arange(5) * 15).max() < 6
    assert same.dropped_seconds == pytest.approx(11 / 8, abs=0.02)
    assert (same.skipped_frames, same.repeated_frames) == (0, 0)
    assert same.cropped == pytest.approx(1 / 3)
    half = load_clip(tmp_path / "v.mp4", num_frames=5, height=32, width=32, fps=4)
    assert (half.skipped_frames, half.repeated_frames) == (4, 0)
    assert np.abs(half.frames.mean(axis=(1, 2, 3)) - np.arange(0, 10, 2) * 15).max() < 6
    double = load_clip(tmp_path / "v.mp4", num_frames=9, height=32, width=48, fps=16)
    assert (double.skipped_frames, double.repeated_frames, double.cropped) == (0, 4, 0.0)
    assert np.abs(double.frames.mean(axis=(1, 2, 3)) - (np.arange(9) // 2) * 15).max() < 6
    with pytest.raises(DataError, match="gives 16 frames at 8 per second; 17 are wanted"):
        load_clip(tmp_path / "v.mp4", num_frames=17, height=32, width=32, fps=8)


def test_bad_videos_stop_or_are_skipped_on_request(tmp_path, caplog):
    write_clips(tmp_path, count=5)
    (tmp_path / "1.mp4").write_bytes(b"not a video")
    write_video(tmp_path / "2.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=8)
    entries = read_dataset(tmp_path)
    pipe = micro_pipeline()
    with pytest.raises(
        DataError, match=r"2 of 5 videos cannot be used: .*1\.mp4 does not decode.*2\.mp4 gives 3 frames"
    ):
        LatentCache(tmp_path / "cache", pipe, entries, CONFIG)
    cache = LatentCache(tmp_path / "cache", pipe, entries, dataclasses.replace(CONFIG, skip_bad=True))
    assert len(cache) == 3
    assert [entry.path.name for entry in cache.entries] == ["0.mp4", "3.mp4", "4.mp4"]
    assert "skipped 2 of 5" in caplog.text


def test_what_fitting_drops_is_told_and_logged(tmp_path, caplog):
    write_clips(tmp_path, count=2, frames=9, fps=8)
    LatentCache(
        tmp_path / "cache", micro_pipeline(), read_dataset(tmp_path), dataclasses.replace(CONFIG, fps=4, width=16)
    )
    assert "of 2 videos that were encoded now, " in caplog.text
    assert (
        "8 frames are skipped to come down to 4 per second; 2 are cropped, by up to 50% of the picture" in caplog.text
    )
    rows = read_jsonl(tmp_path / "cache" / "fitting-0.jsonl")
    assert [row["video"] for row in rows] == ["0.mp4", "1.mp4"]
    assert rows[0]["skipped_frames"] == 4 and rows[0]["cropped"] == 0.5
    LatentCache(tmp_path / "late", micro_pipeline(), read_dataset(tmp_path), CONFIG)
    assert "1.0 seconds after the 5 frames that are trained on are not used" in caplog.text


def test_cache_holds_what_the_pipeline_computes(videos, tmp_path):
    pipe = micro_pipeline()
    entries = read_dataset(videos)
    cache = LatentCache(tmp_path, pipe, entries, CONFIG)
    latents, text = cache[1]
    clip = load_clip(entries[1].path, num_frames=5, height=32, width=32, fps=8).frames
    video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.encode(video).latent_dist.mode()[0]
        embedding, _ = pipe.encode_prompt(entries[1].caption, do_classifier_free_guidance=False, max_sequence_length=16)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(text, embedding[0])
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    LatentCache(tmp_path, pipe, entries, CONFIG)
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    other = LatentCache(tmp_path, pipe, entries, dataclasses.replace(CONFIG, num_frames=9))
    assert other[0][0].shape[1] == 5 and not set(other.files) & set(cache.files)


# --- objectives -------------------------------------------------------------------------------------------------------


def test_flow_objective_is_flow_matching():
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 3, 8, 8).unbind()
    sigma, text = torch.tensor([0.3, 0.8]), torch.randn(2, 7, 16)
    seen = []

    def student(noisy, level, embedding):
        seen.append((noisy, level, embedding))
        return torch.zeros_like(noisy)

    loss = training_loss(student, None, latents, noise, sigma, text, CONFIG)
    torch.testing.assert_close(loss, (noise - latents).square().mean())
    torch.testing.assert_close(seen[0][0][1], 0.2 * latents[1] + 0.8 * noise[1])


@pytest.mark.parametrize("trainable", ["all", "phi", "lora"])
def test_teacher_is_the_softmax_model(trainable):
    pipe = micro_pipeline()
    inputs = (torch.randn(1, 4, 3, 8, 8), torch.tensor([0.5]), torch.randn(1, 7, 16))
    with torch.no_grad():
        expected = velocity_of(pipe.transformer)(*inputs)
    asg.convert_(pipe.transformer, asg.HybridConfig(RATES))
    config = dataclasses.replace(CONFIG, trainable=trainable)
    from attention_surgery.finetuning.loop import prepare_parameters_

    prepare_parameters_(pipe.transformer, config)
    teacher = teacher_velocity(pipe.transformer, config)
    torch.testing.assert_close(teacher(*inputs), expected)
    with torch.no_grad():
        assert not torch.allclose(velocity_of(pipe.transformer)(*inputs), expected)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["all", "phi", "lora"])
@pytest.mark.parametrize("objective", ["flow", "both"])
def test_what_trains_and_what_does_not(videos, tmp_path, trainable, objective):
    pipe = converted()
    before = weights(pipe)
    finetune(
        pipe,
        videos,
        config=dataclasses.replace(CONFIG, trainable=trainable, objective=objective, lora_rank=4),
        output_dir=tmp_path,
    )
    after = weights(pipe)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    phi = {name for name in before if ".processor." in name}
    assert phi <= moved
    if trainable == "phi":
        assert moved == phi
    if trainable == "lora":
        assert "blocks.1.attn1.to_q.weight" in moved and "patch_embedding.weight" not in moved
        assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    if trainable == "all":
        assert "patch_embedding.weight" in moved


def test_loss_falls_and_everything_is_logged(videos, tmp_path):
    config = dataclasses.replace(
        CONFIG,
        max_steps=30,
        evaluate_every=10,
        ema_decay=0.5,
        validation_prompts=("a red ball",),
        validate_every=15,
        validation_steps=2,
        trackers=("tensorboard",),
    )
    finetune(converted(), videos, config=config, output_dir=tmp_path)
    rows = read_jsonl(tmp_path / "log.jsonl")
    heldout = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    assert list(heldout) == [0, 10, 20, 30]
    assert heldout[30] < heldout[0]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 31))
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == [
        "step-0000000",
        "step-0000015",
        "step-0000030",
    ]
    assert (tmp_path / "validation" / "step-0000015" / "000.mp4").stat().st_size > 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == config.keep_checkpoints
    assert any((tmp_path / "trackers").rglob("events.out.tfevents*"))


def test_weights_and_biases(videos, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = dataclasses.replace(CONFIG, max_steps=2, trackers=("wandb", "tensorboard"))
    finetune(converted(), videos, config=config, output_dir=tmp_path / "run")
    (record,) = tmp_path.rglob("run-*.wandb")
    assert b"heldout_loss" in record.read_bytes() and b"gradient_norm" in record.read_bytes()
    assert any((tmp_path / "run" / "trackers").rglob("events.out.tfevents*"))


def test_accumulation_and_gradient_checkpointing_do_not_change_the_result(videos, tmp_path):
    config = dataclasses.replace(CONFIG, mixed_precision="no", batch_size=4, max_steps=3)
    results = []
    for i, changes in enumerate(({}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": False})):
        pipe = converted()
        finetune(pipe, videos, config=dataclasses.replace(config, **changes), output_dir=tmp_path / str(i))
        results.append(weights(pipe))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


WORKER = """
import os, sys
sys.path.insert(0, sys.argv[3])
import dataclasses, torch
from test_finetuning import CONFIG, converted, finetune
torch.set_num_threads(1)
pipe = converted()
config = dataclasses.replace(CONFIG, max_steps=int(sys.argv[4]), ema_decay=0.9, mixed_precision="no",
                             batch_size=4, checkpoint_every=5)
finetune(pipe, sys.argv[1], config=config, output_dir=sys.argv[2], resume=(len(sys.argv) > 5))
if os.environ.get("RANK", "0") == "0":
    torch.save(pipe.transformer.state_dict(), sys.argv[2] + "/result.pt")
"""


def worker(videos: Path, folder: Path, steps: int, *flags: str) -> list[str]:
    return [sys.executable, "-c", WORKER, str(videos), str(folder), str(Path(__file__).parent), str(steps), *flags]


def test_killed_and_resumed_is_the_unbroken_run(videos, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(worker(videos, tmp_path / "unbroken", 40), check=True, env=environment, timeout=200)
    killed = tmp_path / "killed"
    process = subprocess.Popen(worker(videos, killed, 40), env=environment)
    deadline = time.monotonic() + 120
    while not (killed / "log.jsonl").exists() or len((killed / "log.jsonl").read_text().splitlines()) < 14:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "result.pt").exists()
    subprocess.run(worker(videos, killed, 40, "resume"), check=True, env=environment, timeout=200)
    one = torch.load(tmp_path / "unbroken" / "result.pt", weights_only=True)
    two = torch.load(killed / "result.pt", weights_only=True)
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [row["step"] for row in read_jsonl(killed / "log.jsonl") if "loss" in row]
    assert steps == list(range(1, 41))


def test_two_processes_compute_what_one_does(videos, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(worker(videos, tmp_path / "one", 6), check=True, env=environment, timeout=200)
    script = tmp_path / "worker.py"
    script.write_text(
        WORKER + "open(f'{sys.argv[2]}/{torch.distributed.get_world_size()}-{torch.distributed.get_rank()}', 'w')\n"
    )
    arguments = [str(script), str(videos), str(tmp_path / "two"), str(Path(__file__).parent), "6"]
    subprocess.run([*launch_two_processes(29611), *arguments], check=True, env=environment | NO_GPU, timeout=300)
    assert (tmp_path / "two" / "2-0").exists() and (tmp_path / "two" / "2-1").exists()
    one = torch.load(tmp_path / "one" / "result.pt", weights_only=True)
    two = torch.load(tmp_path / "two" / "result.pt", weights_only=True)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
    losses = [[row["loss"] for row in read_jsonl(tmp_path / n / "log.jsonl") if "loss" in row] for n in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    heldout = [
        [row["heldout_loss"] for row in read_jsonl(tmp_path / n / "log.jsonl") if "heldout_loss" in row]
        for n in ("one", "two")
    ]
    assert heldout[1] == pytest.approx(heldout[0], rel=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_refusals_change_nothing(videos, tmp_path):
    pipe = micro_pipeline()
    with pytest.raises(ModelError, match="convert_ it before"):
        finetune(pipe, videos, config=CONFIG, output_dir=tmp_path / "run")
    pipe = converted()
    before = weights(pipe)
    with pytest.raises(DataError, match="6 videos, of which 6 are held out"):
        finetune(pipe, videos, config=dataclasses.replace(CONFIG, heldout_videos=6), output_dir=tmp_path / "run")
    for options, error, message in (
        ({"num_frames": 6}, ConfigError, "num_frames is 6; this model takes 5 or 7"),
        ({"trackers": ("comet_ml",)}, ConfigError, r"trackers \['comet_ml'\] are not installed"),
    ):
        with pytest.raises(error, match=message):
            finetune(pipe, videos, config=dataclasses.replace(CONFIG, **options), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        finetune(pipe, videos, config=CONFIG, output_dir=tmp_path / "mine")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(pipe).items())


def test_run_folders_are_not_mixed(videos, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=2)
    finetune(converted(), videos, config=config, output_dir=tmp_path)
    with pytest.raises(RunError, match="resume=True"):
        finetune(converted(), videos, config=config, output_dir=tmp_path)
    with pytest.raises(RunError, match=r"lr: 0\.001 → 0\.5"):
        finetune(converted(), videos, config=dataclasses.replace(config, lr=0.5), output_dir=tmp_path, resume=True)


def test_a_run_does_not_go_on_with_other_weights_or_videos(videos, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=2)
    shutil.copytree(videos, tmp_path / "videos")
    finetune(converted(), tmp_path / "videos", config=config, output_dir=tmp_path / "run")
    other = converted()
    with torch.no_grad():
        other.transformer.blocks[0].attn1.processor.phi_q.weight_0.add_(1)
    with pytest.raises(RunError, match="weights: "):
        finetune(other, tmp_path / "videos", config=config, output_dir=tmp_path / "run", resume=True)
    (tmp_path / "videos" / "0.txt").write_text("a blue ball in red")
    with pytest.raises(RunError, match="videos: "):
        finetune(converted(), tmp_path / "videos", config=config, output_dir=tmp_path / "run", resume=True)


def test_videos_that_cannot_be_used_leave_the_folder_free(tmp_path):
    """The same folder takes the run once the videos are repaired, or are to be skipped."""
    write_clips(tmp_path / "videos", count=4)
    (tmp_path / "videos" / "1.mp4").write_bytes(b"not a video")
    config = dataclasses.replace(CONFIG, max_steps=1)
    with pytest.raises(DataError, match=r"1 of 4 videos cannot be used: .*1\.mp4 does not decode"):
        finetune(converted(), tmp_path / "videos", config=config, output_dir=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]
    config = dataclasses.replace(config, skip_bad=True, heldout_videos=1)
    finetune(converted(), tmp_path / "videos", config=config, output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").exists()


def test_a_video_is_not_held_out_and_trained_on(tmp_path):
    write_clips(tmp_path / "videos", count=4)
    shutil.copy(tmp_path / "videos" / "0.mp4", tmp_path / "videos" / "4.mp4")
    shutil.copy(tmp_path / "videos" / "0.txt", tmp_path / "videos" / "4.txt")
    with pytest.raises(DataError, match=r"\['0\.mp4', '4\.mp4'\] are the same video and caption"):
        finetune(converted(), tmp_path / "videos", config=CONFIG, output_dir=tmp_path / "run")


@pytest.fixture
def graphs(monkeypatch) -> list[bool]:
    """Of each graph that is compiled from here on, whether for a gradient; each then runs as it is, in no time."""
    torch._dynamo.reset()
    seen: list[bool] = []
    stock = torch.nn.Module.compile

    def compiler(graph, inputs):
        seen.append(torch.is_grad_enabled())
        return graph.forward

    def compiled(module, **options):
        assert options == {"fullgraph": True, "dynamic": False}
        stock(module, backend=compiler, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    return seen


@pytest.mark.parametrize(
    ("trainable", "objective", "of_teacher"),
    [("all", "flow", 0), ("all", "both", 1), ("lora", "both", 2)],  # softmax, which is another code where it stands in
)
def test_compiled_blocks_train_alike(videos, tmp_path, graphs, trainable, objective, of_teacher: int):
    """Also what evaluates and teaches is compiled; afterwards the model is as before."""
    losses = []
    for compiled in (False, True):
        pipe = converted()
        pipe.transformer.blocks[1]._compiled_call_impl = before = pipe.transformer.blocks[1]._call_impl
        config = dataclasses.replace(
            CONFIG, compile=compiled, trainable=trainable, objective=objective, max_steps=3, mixed_precision="no"
        )
        assert not graphs
        finetune(pipe, videos, config=config, output_dir=tmp_path / str(compiled))
        assert [block._compiled_call_impl for block in pipe.transformer.blocks] == [None, before, None]
        rows = read_jsonl(tmp_path / str(compiled) / "log.jsonl")
        losses.append([row[name] for row in rows for name in ("loss", "heldout_loss") if name in row])
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    kinds, batches = 3, 2  # of blocks: two rates, and softmax; to train on, and held out
    assert graphs.count(True) == kinds
    assert graphs.count(False) == kinds + batches * of_teacher


def test_a_run_from_before_there_was_a_choice_was_not_compiled(videos, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=2)
    finetune(converted(), videos, config=config, output_dir=tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.pop("compile") is False
    (tmp_path / "config.json").write_text(json.dumps(settings))
    finetune(converted(), videos, config=config, output_dir=tmp_path, resume=True)
    with pytest.raises(RunError, match="compile: False → True"):
        compiled = dataclasses.replace(config, compile=True)
        finetune(converted(), videos, config=compiled, output_dir=tmp_path, resume=True)


def test_processes_that_share_a_batch_compile_whole_blocks():
    """By default PyTorch cuts them where a bucket of gradients ends."""
    model = converted().transformer
    with compiled_blocks(model):
        assert not torch._dynamo.config.optimize_ddp
        assert all(block._compiled_call_impl for block in model.blocks)
    assert torch._dynamo.config.optimize_ddp


@pytest.mark.parametrize("compiled", [False, True])
def test_divergence_names_block_step_and_videos_and_keeps_the_last_checkpoint(videos, tmp_path, graphs, compiled: bool):
    config = dataclasses.replace(
        CONFIG, lr=1e30, max_grad_norm=1e30, mixed_precision="no", checkpoint_every=1, compile=compiled
    )
    with pytest.raises(DivergenceError, match=r"\(block 0\) at step \d, batch of \[.*\.mp4"):
        finetune(converted(), videos, config=config, output_dir=tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".step-*"))
    assert bool(graphs) == compiled


def test_the_first_bad_block_is_found():
    model = converted().transformer
    inputs = (torch.randn(1, 4, 3, 8, 8), torch.tensor([0.5]), torch.randn(1, 7, 16))
    assert first_bad_block(model, *inputs) is None
    with torch.no_grad():
        model.blocks[1].ffn.net[2].weight[0, 0] = torch.inf
    assert first_bad_block(model, *inputs) == 1
    assert not any(block._forward_hooks for block in model.blocks)


def test_a_gradient_that_is_not_finite_changes_no_weight(videos, tmp_path):
    """The loss may be finite where its gradient is not: no weight, and no checkpoint, may take it in."""
    pipe = converted()
    seen = []

    def poison(gradient):
        seen.append(1)
        return torch.full_like(gradient, torch.nan) if len(seen) == 3 else gradient

    pipe.transformer.blocks[1].ffn.net[2].weight.register_hook(poison)
    config = dataclasses.replace(CONFIG, mixed_precision="no", gradient_checkpointing=False)
    message = r"gradient of blocks\.1\.ffn\.net\.2\.weight is not finite at step 2, batch of \['\d\.mp4', '\d\.mp4'\]"
    with pytest.raises(DivergenceError, match=message):
        finetune(pipe, videos, config=config, output_dir=tmp_path)
    assert all(tensor.isfinite().all() for tensor in weights(pipe).values())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]


@pytest.mark.parametrize("damage", ["truncated", "missing key", "averages"])
def test_a_damaged_checkpoint_is_named(videos, tmp_path, damage):
    config = dataclasses.replace(CONFIG, max_steps=2, ema_decay=0.5)
    finetune(converted(), videos, config=config, output_dir=tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    file = checkpoint / ("ema.pt" if damage == "averages" else "model.safetensors")
    if damage == "missing key":
        tensors = load_file(file)
        del tensors["blocks.0.attn1.processor.phi_q.weight_0"]
        save_file(tensors, file)
    else:
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"(?s)step-0000002 cannot be loaded: .*delete it"):
        finetune(converted(), videos, config=config, output_dir=tmp_path, resume=True)


@pytest.mark.parametrize(
    "refusal", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_checkpoint_that_cannot_be_written_is_an_error(videos, tmp_path, monkeypatch, refusal):
    from accelerate import Accelerator

    save = Accelerator.save_state

    def full(self, folder):
        if "step-0000004" in folder:
            raise refusal
        save(self, folder)

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(RunError, match="No space left on device; earlier ones stand"):
        finetune(converted(), videos, config=CONFIG, output_dir=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]


@pytest.mark.parametrize(
    "options",
    [
        {"trainable": "some"},
        {"objective": "mse"},
        {"lr": 0.0},
        {"batch_size": 3, "gradient_accumulation_steps": 2},
        {"ema_decay": 1.0},
        {"validate_every": 5},
        {"heldout_videos": 0},
    ],
)
def test_options_outside_their_range(options):
    with pytest.raises(ConfigError):
        FinetuneConfig(**options)
