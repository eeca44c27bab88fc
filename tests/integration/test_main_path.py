"""The main job on real files: videos to cache to trained model to predictions, each step by its real command."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.decode.frames import FrameRequest
from stages.decode.reader import decode
from stages.frozen.load import load_encoder, load_teacher

# Features are stored as float16 (11 bits); y* is stored as float32, but batches differ, and with them the last bits.
FLOAT16_RELATIVE = 1e-3
BATCHING = 1e-4


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["split"] == "train"]


def train(world, name, *more, epochs=2):
    done = world.run(
        "train", *world.options(name=name), "--set", f"train.epochs={epochs}", "--set", "train.kd_frames=2", *more
    )
    assert done.returncode == 0, done.stderr
    return world.folder / "runs" / name


@pytest.fixture(scope="module")
def trained(world):
    return train(world, "first")


def test_cached_features_are_those_of_the_frozen_networks_on_the_planned_frames(world):
    config = resolve(preset="tiny").config
    encoder, teacher = load_encoder(config.encoder), load_teacher(config.teacher)
    cache = FeatureCache.open(world.cache)
    video = cache.video_ids()[0]
    times = cache.cached_times_s(video)
    sizes = tuple((network.size_px, network.size_px) for network in (encoder, teacher))
    frames = decode(FrameRequest(world.videos / f"{video}.mp4", times, sizes, "pyav", 0.5))
    cached = cache.read(video, times)
    assert cached.features.dtype == np.float16
    features = encoder(torch.from_numpy(frames.views[0])).numpy()
    np.testing.assert_allclose(cached.features, features, rtol=FLOAT16_RELATIVE, atol=FLOAT16_RELATIVE)
    targets = teacher(torch.from_numpy(frames.views[1])).numpy()
    np.testing.assert_allclose(cached.targets, targets, rtol=BATCHING, atol=BATCHING)
    assert np.abs(cached.targets[0] - cached.targets[-1]).max() > BATCHING * 10, (
        "the teacher says the same of all frames"
    )


def test_a_second_extraction_does_nothing_and_starts_no_ray(world):
    before = {path.name: path.stat().st_mtime_ns for path in (world.cache / "commits").iterdir()}
    done = world.run("extract", *world.options(), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["extracted_now"] == 0
    assert "Ray" not in done.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in (world.cache / "commits").iterdir()}


def test_a_checkpoint_holds_the_trained_parts_and_nothing_else(trained):
    index = json.loads((trained / "checkpoints" / "index.json").read_text())
    tensors = load_file(trained / "checkpoints" / index["best"] / "model.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"qformer", "language_projection", "alignment"}


def test_two_runs_with_one_seed_have_the_same_losses(world, trained):
    again = train(world, "second")
    assert losses(again) == losses(trained)
    assert len(losses(trained)) > 2


def test_another_seed_gives_other_losses(world, trained):
    other = train(world, "other-seed", "--set", "train.seed=7")
    assert losses(other) != losses(trained)


def test_evaluation_writes_metrics_and_predictions_for_every_task(world, trained):
    done = world.run("evaluate", "--run", trained, "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((trained / "metrics.json").read_text())
    assert json.loads(done.stdout) == metrics
    predictions = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert set(metrics) == {"relationship", "way_speaking", "scene", "director", "genre", "writer", "year"}
    for task, score in metrics.items():
        rows = [row for row in predictions if row["task"] == task]
        assert score["n"] == len(rows) > 0
        assert score["correct"] == sum(row["answers"][0] == row["gold"] for row in rows)
        assert score["top1"] == score["correct"] / score["n"]
        assert score["ci95"][0] <= score["top1"] <= score["ci95"][1]
        assert 0.25 <= score["floor"] < 1
        assert all(len(row["answers"]) == len(row["log_probability"]) == 5 for row in rows)
        assert all(row["log_probability"] == sorted(row["log_probability"], reverse=True) for row in rows)


def test_prediction_from_the_file_agrees_with_evaluation_from_the_cache(world, trained):
    if not (trained / "predictions.jsonl").exists():
        assert world.run("evaluate", "--run", trained).returncode == 0
    row = json.loads((trained / "predictions.jsonl").read_text().splitlines()[0])
    video = world.videos / f"{row['video']}.mp4"
    done = world.run("predict", video, "--question", row["question"], "--run", trained, "--json")
    assert done.returncode == 0, done.stderr
    predicted = json.loads(done.stdout)
    assert predicted["answer"] == row["answers"][0]
    assert predicted["log_probability"][0] == pytest.approx(row["log_probability"][0], abs=0.02)
    assert predicted["seconds"] > 0


def test_without_distillation_nothing_of_it_is_trained_or_logged(world):
    run = train(world, "baseline", "--set", "alignment.kd_weight=0", epochs=1)
    index = json.loads((run / "checkpoints" / "index.json").read_text())
    tensors = load_file(run / "checkpoints" / index["best"] / "model.safetensors")
    assert not any(name.startswith("alignment.") for name in tensors)
    assert "kd_loss" not in (run / "metrics.jsonl").read_text()
