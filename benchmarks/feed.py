"""Windows per second through the training feed, against the same feed over raw memory maps, and against a step's need.

Both sides run the same loader, the same workers and the same collation; in place of the cache, the raw side copies the
same rows out of memory-mapped .npy files. Videos hold random numbers; windows are that many frames in a row at a random
start. Readings are taken in turns, each with workers of its own; the clock runs from the first batch to the last, so
starting the workers is not counted. Kept buffers are the allocator's settings that the feed gives its workers; it is
also measured without. What a training step needs is one window per so many seconds: forward and backward of the
full-width Q-Former on `--step-frames` frames, scaled to the window's frames.
Results go to benchmarks/results/feed-<date>.json.

    python benchmarks/feed.py
    python benchmarks/feed.py --videos 2 --frames 20 --window 8 --patches 9 --width 16 --batches 8 --step-frames 0
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from result_file import write_result
from transformers import InstructBlipQFormerConfig

from model.config import QFormerConfig
from model.qformer.parts import TextTokens
from model.qformer.qformer import MemoryQFormer
from pipeline.settings.config import resolve
from stages.batches import feed as feed_module
from stages.batches.feed import feed
from stages.batches.windows import WindowDataset
from stages.cache import FeatureCache, Fingerprint
from stages.cache.feature_cache import CachedFrames
from stages.data.manifest import Sample
from stages.networks.tokens import Tokenizers

TARGET_WIDTH = 1152
FULL_WIDTH = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 30523}


class MemoryMaps:
    """The part of a cache that a dataset uses, over .npy files; opened by whoever reads."""

    def __init__(self, root):
        self.root = root
        self._opened = {}

    def __getstate__(self):
        return {"root": self.root, "_opened": {}}

    def read(self, video, times_s, **_options):
        if video not in self._opened:
            parts = (np.load(self.root / f"{video}.{name}.npy", mmap_mode="r") for name in ("features", "targets"))
            self._opened[video] = tuple(parts)
        rows = np.asarray(times_s, dtype=np.int64)
        features, wanted = self._opened[video]
        return CachedFrames(np.asarray(times_s), np.array(features[rows]), np.array(wanted[rows]))


def write(root, arguments):
    """The same numbers as a cache of each storage type and as .npy files."""
    random = np.random.default_rng(0)
    shape = (arguments.frames, arguments.patches, arguments.width)
    caches = {
        kind: FeatureCache.create_or_open(root / kind, Fingerprint(fields={"storage": kind}))
        for kind in ("float16", "int8")
    }
    maps = root / "maps"
    maps.mkdir()
    for video in range(arguments.videos):
        features = random.standard_normal(shape, dtype=np.float32).astype(np.float16)
        targets = random.standard_normal((arguments.frames, TARGET_WIDTH), dtype=np.float32)
        for cache in caches.values():
            cache.write_video(
                f"v{video}", times_s=np.arange(float(arguments.frames)), features=features, targets=targets
            )
        np.save(maps / f"v{video}.features.npy", features)
        np.save(maps / f"v{video}.targets.npy", targets)
    return {**caches, "maps": MemoryMaps(maps)}


def samples(arguments):
    random = np.random.default_rng(1)
    for index in range(arguments.batches * arguments.batch_size):
        start_s = float(random.integers(arguments.frames - arguments.window + 1))
        yield Sample(
            id=str(index),
            video=f"v{random.integers(arguments.videos)}",
            task="scene",
            question="what is the scene?",
            answer="office",
            split="train",
            times_s=tuple(start_s + np.arange(arguments.window)),
        )


def windows_per_s(source, tokenizers, arguments, *, keep_buffers):
    """Of one reading; the first batches only start the clock."""
    settings = feed_module._KEEP_BUFFERS
    feed_module._KEEP_BUFFERS = settings if keep_buffers else {}
    try:
        dataset = WindowDataset(source, list(samples(arguments)), tolerance_s=0.0, with_targets=True)
        size = arguments.batch_size
        places = [range(start, start + size) for start in range(0, len(dataset), size)]
        batches = feed(dataset, places, tokenizers, workers=arguments.workers)
        for _ in range(arguments.workers):
            next(batches)
        started = time.perf_counter()
        counted = sum(len(batch.samples) for batch in batches)
        return counted / (time.perf_counter() - started)
    finally:
        feed_module._KEEP_BUFFERS = settings


def seconds_per_window(arguments):
    """Forward and backward of the full-width Q-Former, per window; None where it is not asked for."""
    if not arguments.step_frames:
        return None
    torch.manual_seed(0)
    frames = arguments.step_frames
    config = QFormerConfig(max_frames=max(120, frames))
    model = MemoryQFormer(InstructBlipQFormerConfig(**FULL_WIDTH), 32, config).to(arguments.device)
    features = torch.randn(1, frames, 257, 1408, device=arguments.device)
    ids = torch.randint(1, 30000, (1, 12), device=arguments.device)
    text = TextTokens(ids, torch.ones_like(ids, dtype=torch.bool))
    taken = []
    for _ in range(2):
        model.zero_grad()
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for chunk in model.chunks(features, text):
            torch.stack([level.square().mean() for level in chunk.levels]).sum().backward()
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken) * arguments.window / frames


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--frames", type=int, default=150, help="frames of each video")
    parser.add_argument("--window", type=int, default=100, help="frames of each window")
    parser.add_argument("--patches", type=int, default=257)
    parser.add_argument("--width", type=int, default=1408)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--step-frames", type=int, default=20, help="0 measures no training step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=None, help="where the data goes for the time; default the system's")
    return parser.parse_args()


def main():
    arguments = parse()
    tokenizers = Tokenizers.load(resolve(preset="tiny").config)
    kinds = [("maps", True), ("float16", True), ("int8", True), ("maps", False), ("float16", False)]
    rates = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sources = write(Path(folder), arguments)
        for _ in range(arguments.repeat):
            for name, keep in kinds:
                rates[name, keep].append(windows_per_s(sources[name], tokenizers, arguments, keep_buffers=keep))
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    window_bytes = arguments.window * arguments.patches * arguments.width * 2
    need_s = seconds_per_window(arguments)
    result = {
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "device": arguments.device},
        "settings": vars(arguments),
        "window_bytes_float16": window_bytes,
        "windows_per_s": [
            {"source": name, "keep_buffers": keep, "median": medians[name, keep], "all": found}
            for (name, keep), found in rates.items()
        ],
        "ratio_to_memory_maps": medians["float16", True] / medians["maps", True],
        "ratio_to_memory_maps_without_kept_buffers": medians["float16", False] / medians["maps", False],
        "step_s_per_window": need_s,
        "feed_over_need": None if need_s is None else medians["float16", True] * need_s,
    }
    write_result("feed", result)
    for (name, keep), rate in medians.items():
        print(
            f"{name:8} {'kept' if keep else 'returned':9} {rate:8.1f} windows/s {rate * window_bytes / 1e9:6.2f} GB/s"
        )
    print(f"float16 / memory maps: {result['ratio_to_memory_maps']:.2f} (target >= 0.7)")
    if need_s is not None:
        print(f"a step needs a window every {need_s:.2f} s; the feed gives {result['feed_over_need']:.0f} in that time")


if __name__ == "__main__":
    main()
