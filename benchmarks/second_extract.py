"""A second `pipeline extract` over a finished cache: how long the command takes to find that nothing is left to do.

The cache is filled through the real cache code with drawn features of the tiny networks' shapes, the corpus is a JSON
Lines data set with a file for each video. The command runs as a process of its own, from start to exit, once without
being counted. The description of the networks' checkpoints is remembered from the filling on, so no weights are read.

    python benchmarks/second_extract.py --videos 10000 --repeat 3
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiny_corpus
from result_file import write_result

from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.cache.source import look_at
from stages.data.frame_plan import plan_frames
from stages.frozen.identity import fingerprint, settle_precision
from stages.frozen.shapes import frame_shape

WRITERS = 8


def fill(folder, options):
    """Commit every planned frame, as the workers would, and write the ledger."""
    config = resolve(preset="tiny", options={f"data.{name}": value for name, value in options.items()}).config
    manifest = locations.manifest_of(config, with_videos=True)
    plan, videos = plan_frames(manifest), locations.videos_folder(config)
    extract = settle_precision(config.extract)
    cache = FeatureCache.create_or_open(folder / "cache", fingerprint(config, extract))
    shape = frame_shape(config)
    numbers = np.random.default_rng(0)

    def commit(video):
        times_s = plan.times_s[video]
        features = numbers.standard_normal((len(times_s), shape.tokens, shape.width), dtype=np.float32)
        targets = np.ones((len(times_s), shape.teacher_width), np.float32)
        source = look_at(str(videos / manifest.videos[video].path), named=manifest.videos[video].path)
        return cache.write_video(video, times_s=times_s, features=features, targets=targets, source=source)

    with ThreadPoolExecutor(WRITERS) as pool, cache.ledger.writer() as ledger:
        for record in pool.map(commit, plan.times_s):
            ledger.done(record.video, checksum=record.checksum, attempts=1)
    return plan


def run(folder, options):
    """Seconds of the command, and its summary."""
    named = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "pipeline", "extract", "--preset", "tiny", *named, "--cache", folder / "cache"]
    started = time.perf_counter()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    return time.perf_counter() - started, json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-second-"))
    try:
        options = tiny_corpus.write(folder, arguments.videos)
        plan = fill(folder, options)
        runs = [run(folder, options) for _ in range(arguments.repeat + 1)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for _, summary in runs:
        assert summary["done"] == arguments.videos, summary
        assert summary["extracted_now"] == 0, summary
    seconds = [spent for spent, _ in runs]
    result = {
        "hardware": {"cpu_cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()},
        "work": {"videos": plan.num_videos, "frames": plan.num_frames, "preset": "tiny"},
        "uncounted_s": seconds[0],
        "seconds": seconds[1:],
        "median_s": statistics.median(seconds[1:]),
    }
    print(json.dumps(result, indent=1))
    write_result("second-extract", result)


if __name__ == "__main__":
    main()
