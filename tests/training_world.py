"""A data set of random features that trains in seconds: the real commands on a real cache, without any video."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.cache import FeatureCache
from stages.data.frame_plan import plan_frames
from stages.weights.repository import BUNDLED

CARD = """\
name: random
title: Random features
annotations: {format: jsonl, file: samples.jsonl}
videos: {pattern: "{id}.mp4"}
text: caption
tasks: {scene: {prompt: "what is the {} of the movie?", labels: [airport, hotel, office, prison]}}
frame_rule: {kind: uniform, num_frames: 6, index_fps: 10, jitter: true}
"""
LABELS = ("airport", "hotel", "office")  # and nobody is in prison but in the validation split
VIDEOS = {"train": 16, "val": 4}
SETTINGS = (
    "train.epochs=3",
    "train.batch_size=4",
    "train.save_every_steps=2",
    "train.validate_every=1",
    "train.kd_frames=2",
)
STEPS = 24  # two samples of each of 16 videos, by 4, three times
FRAMES, PATCHES, WIDTH = 12, 65, 96
NEAR = 1e-3


@dataclass(frozen=True)
class World:
    """The folder that everything is in, and the command line that trains there."""

    folder: Path
    storage: str = "float16"

    @property
    def cache(self):
        return self.folder / "cache"

    def options(self, *more):
        settings = [part for one in SETTINGS for part in ("--set", one)]
        named = {"--preset": "tiny", "--dataset": self.folder / "card.yaml", "--annotations": self.folder}
        named |= {"--cache": self.cache}
        return [*map(str, (part for pair in named.items() for part in pair)), *settings, *map(str, more)]

    def run_folder(self, name):
        return self.folder / "runs" / name

    def start(self, name, *more):
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "train", *self.options("--name", name, *more)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, name, *more):
        """Train to the end; what was told, on stderr first."""
        process = self.start(name, *more)
        result, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
        return told + result

    def config(self):
        options = {
            "data.dataset": str(self.folder / "card.yaml"),
            "data.annotations": str(self.folder),
            "cache.root": str(self.cache),
        }
        return resolve(preset="tiny", options=options, overrides=[f"extract.storage={self.storage}"]).config


def make(folder, *, storage="float16"):
    """Write the card, the samples, and a cache of random numbers for all planned frames."""
    from stages.frozen.identity import fingerprint, settle_precision

    world = World(folder, storage)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.yaml").write_text(CARD, encoding="utf-8")
    rows = []
    for split, count in VIDEOS.items():
        for video in range(count):
            for _question in range(2):
                answer = "prison" if (split, video) == ("val", 0) else LABELS[video % len(LABELS)]
                rows.append(
                    {
                        "video": f"{split}_{video}",
                        "duration_s": (FRAMES - 1) / 10,
                        "task": "scene",
                        "question": "scene",
                        "answer": answer,
                        "split": split,
                    }
                )
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = world.config()
    cache = FeatureCache.create_or_open(world.cache, fingerprint(config, settle_precision(config.extract)))
    random = np.random.default_rng(0)
    with cache.ledger.writer() as ledger:
        for video, times_s in plan_frames(locations.manifest_of(config)).times_s.items():
            record = cache.write_video(
                video,
                times_s=times_s,
                features=random.standard_normal((len(times_s), PATCHES, WIDTH)).astype(np.float16),
                targets=random.standard_normal((len(times_s), WIDTH)).astype(np.float32),
            )
            ledger.done(video, checksum=record.checksum, attempts=1)
    return world


def dropping_out(world, rate=0.1):
    """The setting of a Q-Former like the tiny one, whose configuration has no dropout, with it."""
    folder = world.folder / "dropping-out"
    if not folder.exists():
        shutil.copytree(BUNDLED / "tiny-instructblip", folder)
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        described["qformer_config"] |= {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
        (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return f"qformer.source={folder}"


def rows_of(run, split="train"):
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def numbers(run):
    """Everything that was logged and is no time, in the order of the file."""
    timed = {"data_wait_s", "samples_per_s"}
    return [
        {name: value for name, value in row.items() if name not in timed}
        for split in ("train", "val")
        for row in rows_of(run, split)
    ]


def near(one, other, tolerance=NEAR):
    """Assert that two runs logged the same steps and nearly the same numbers: sums in another order are others."""
    mine, theirs = numbers(one), numbers(other)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for row, its in zip(mine, theirs, strict=True):
        assert row["split"] == its["split"]
        for name in row.keys() - {"split"}:
            assert row[name] == pytest.approx(its[name], rel=tolerance, abs=tolerance / 10), (
                f"{name} at step {row['step']}"
            )


def wait_for_step(run, step, process, deadline_s=120.0):
    """Return when the run has logged `step` or its process has ended."""
    until = time.monotonic() + deadline_s
    while process.poll() is None and not any(row["step"] >= step for row in rows_of(run)):
        assert time.monotonic() < until, f"step {step} was not reached"
        time.sleep(0.01)


def end(process, number):
    """Send a signal and return exit code and stderr."""
    os.kill(process.pid, number)
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def weights(run):
    """All tensors of the newest checkpoint, the optimizer's included."""
    from safetensors.torch import load_file

    newest = json.loads((run / "checkpoints" / "index.json").read_text())["last"]
    folder = run / "checkpoints" / newest
    return {
        (file, name): t
        for file in ("model", "optimizer")
        for name, t in load_file(folder / f"{file}.safetensors").items()
    }


SIGKILL, SIGTERM, SIGINT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
