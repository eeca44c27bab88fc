"""What the storage type of the cached features does to the accuracy of the trained model.

One set of synthetic videos is extracted once, features stored as float32, by the extraction worker. From that cache one
more is made for each other storage type, by the code that extraction stores features with: so all hold the same
features, rounded in their own way. The tiny preset is then trained and evaluated on each, with the same seeds and order
of samples, and every type is compared with float32 seed by seed, on the same test samples.

    python benchmarks/storage_accuracy.py --seeds 3
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from result_file import write_result

from pipeline.cli import app
from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import Fingerprint
from stages.cache.storage import STORAGE_FIELD, STORAGE_TYPES, widen
from stages.cache.stores.commit import load_record
from stages.data.frame_plan import plan_frames
from stages.data.synthetic import generate
from stages.extract.extraction import Extraction
from stages.extract.worker import ExtractionJob, ExtractionWorker
from stages.frozen.identity import fingerprint, settle_precision

EXACT = "float32"


def extract(folder, videos):
    """Videos and their cache in float32."""
    generate(folder / "data", seed=0, videos_per_split=videos, workers=1)
    config = resolve(preset="tiny", options=data_options(folder), overrides=[f"extract.storage={EXACT}"]).config
    settings = settle_precision(config.extract)
    manifest = locations.manifest_of(config, with_videos=True)
    cache = FeatureCache.create_or_open(folder / EXACT, fingerprint(config, settings))
    job = ExtractionJob(config.encoder, config.teacher, settings, str(folder / EXACT))
    videos_folder = locations.videos_folder(config)
    extraction = Extraction(manifest, plan_frames(manifest), cache, job, videos=videos_folder, retry_failed=False)
    worker = ExtractionWorker(job)
    try:
        summary = extraction.run(lambda tasks: ((worker.process(task), 1) for task in tasks), lambda *_: None)
    finally:
        worker.close()
    assert summary.done == summary.planned, summary.failed
    return cache


def data_options(folder):
    data = folder / "data"
    return {
        "data.dataset": "synthetic",
        "data.videos": str(data / "videos"),
        "data.annotations": str(data / "annotations"),
    }


def store_as(storage, source, root):
    """The same frames in another storage type; returns the relative error of the features."""
    fields = {**source.fingerprint.fields, STORAGE_FIELD: storage}
    cache = FeatureCache.create_or_open(root, Fingerprint(fields=fields))
    off, whole = 0.0, 0.0
    with cache.ledger.writer() as ledger:
        for record in (load_record(source.store, video) for video in source.video_ids()):
            frames = source.read(record.video, record.times_array)
            content = {"times_s": frames.times_s, "features": frames.features, "targets": frames.targets}
            ledger.done(record.video, checksum=cache.write_video(record.video, **content).checksum, attempts=1)
            stored = widen(cache.read(record.video, record.times_array).features).astype(np.float32)
            off += float(np.square(stored - frames.features).sum())
            whole += float(np.square(frames.features).sum())
    return (off / whole) ** 0.5


def command(*words):
    """One command as on the command line, in this process; what it prints on stdout."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        app([str(word) for word in words], standalone_mode=False)
    return printed.getvalue()


def accuracy(folder, storage, task, seed, epochs):
    """Train and evaluate once: top-1 on the test split, and which samples were right."""
    name = f"{task}-{storage}-{seed}"
    data = folder / "data"
    options = {"--preset": "tiny", "--dataset": "synthetic", "--task": task, "--cache": folder / storage}
    options |= {"--videos": data / "videos", "--annotations": data / "annotations", "--name": name}
    settings = [f"train.seed={seed}", f"run.folder={folder / 'runs'}", *([f"train.epochs={epochs}"] if epochs else [])]
    named = [part for pair in options.items() for part in pair]
    command("train", *named, *(part for setting in settings for part in ("--set", setting)))
    (score,) = json.loads(command("evaluate", "--run", folder / "runs" / name, "--json")).values()
    return {"top1": score["top1"], "n": score["n"], "floor": score["floor"]}


def rows_of(runs, storages):
    """A row for each task and storage type: its accuracies, and its differences from float32 by seed."""
    rows = []
    for task in dict.fromkeys(task for task, _, _ in runs):
        seeds = [seed for one, storage, seed in runs if (one, storage) == (task, EXACT)]
        for storage in storages:
            top1 = [runs[task, storage, seed]["top1"] for seed in seeds]
            differences = [value - runs[task, EXACT, seed]["top1"] for value, seed in zip(top1, seeds, strict=True)]
            first = runs[task, EXACT, seeds[0]]
            rows.append(
                {
                    "task": task,
                    "storage": storage,
                    "n": first["n"],
                    "floor": first["floor"],
                    "top1": top1,
                    "mean": statistics.mean(top1),
                    "spread_over_seeds": statistics.pstdev(top1),
                    "differences": differences,
                    "mean_difference": statistics.mean(differences),
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=160, help="videos of the training split")
    parser.add_argument("--test", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["genre", "director"])
    parser.add_argument("--epochs", type=int, help="None: the preset's")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-accuracy-"))
    storages = (EXACT, *(name for name in STORAGE_TYPES if name != EXACT))
    started, runs = time.monotonic(), {}
    try:
        source = extract(folder, {"train": arguments.train, "val": 16, "test": arguments.test})
        errors = {name: store_as(name, source, folder / name) for name in storages[1:]}
        for seed in range(arguments.seeds):
            for task in arguments.tasks:
                for storage in storages:
                    runs[task, storage, seed] = accuracy(folder, storage, task, seed, arguments.epochs)
                    print(
                        f"{time.monotonic() - started:.0f} s",
                        task,
                        storage,
                        seed,
                        runs[task, storage, seed],
                        flush=True,
                    )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "hardware": {"cpu_cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__},
        "work": {**vars(arguments), "preset": "tiny"},
        "relative_error_of_features": {EXACT: 0.0, **errors},
        "rows": rows_of(runs, storages),
    }
    for row in result["rows"]:
        print(f"{row['task']:10} {row['storage']:10} {row['mean']:.3f}  {row['mean_difference']:+.3f}  {row['top1']}")
    write_result("storage-accuracy", result)


if __name__ == "__main__":
    main()
