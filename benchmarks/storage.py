"""What each storage type costs a feature: error, bytes, time; and what each kind of store costs a training window.

Drawn: `iid` is a standard normal; `outliers` has a log-normal scale per channel, ten channels 60 times that, frames
that resemble their neighbours (correlation 0.9) and a cut every 25 frames. Encoder: the bundled tiny vision tower
(random weights) on synthetic videos, which `--source` replaces by a published one. `int8, scale per token` is no
storage type: it shows what is avoided. Errors are against float32; inside ordinary channels means the median over the
channels without the outliers of ||error|| / ||feature||. Windows: 100 random frames in a row out of the cache (float16)
and its exports, against copying the same bytes out of memory-mapped .npy files; least of `--repeat`, warm page cache.
Results go to benchmarks/results/storage-<date>.json.

    python benchmarks/storage.py
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from result_file import write_result

from model.config import EncoderConfig
from stages.cache import STORAGE_TYPES, FeatureCache, Fingerprint, widen
from stages.cache.convert import KINDS, convert
from stages.cache.stores.stores import ZARR
from stages.data.synthetic import generate
from stages.decode.child import DecodeChild
from stages.decode.frames import FrameRequest
from stages.frozen.load import load_encoder

OUTLIERS = 10


def drawn(frames, patches, channels):
    numbers = np.random.default_rng(0)
    iid = numbers.standard_normal((frames, patches, channels), dtype=np.float32)
    scales = np.exp(numbers.normal(0, 0.5, channels)).astype(np.float32)
    outliers = numbers.choice(channels, OUTLIERS, replace=False)
    scales[outliers] *= 60
    walk = iid.copy()
    for frame in range(1, frames):
        if frame % 25:
            walk[frame] = 0.9 * walk[frame - 1] + np.sqrt(1 - 0.9**2) * iid[frame]
    return {"iid": (iid, []), "outliers": (walk * scales, outliers.tolist())}


def encoded(source, num_videos):
    """Features of the encoder on synthetic videos, and the channels whose peak is 20 times the median one's."""
    encoder = load_encoder(EncoderConfig(source=source)).eval()
    features = []
    with tempfile.TemporaryDirectory() as folder, DecodeChild(memory_gb=8) as child:
        generate(Path(folder), seed=0, videos_per_split={"train": num_videos}, workers=1)
        for video in sorted(Path(folder, "videos").glob("*.mp4")):
            request = FrameRequest(
                path=video,
                times_s=np.arange(8.0),
                sizes_px=((encoder.size_px, encoder.size_px),),
                decoder="pyav",
                tolerance_s=0.5,
            )
            frames = child.decode(request, 60).views[0]
            with torch.no_grad():
                features.append(encoder(torch.from_numpy(frames)).float().numpy())
    whole = np.concatenate(features)
    peaks = np.abs(whole).max(axis=(0, 1))
    return whole, np.flatnonzero(peaks > 20 * np.median(peaks)).tolist()


def per_token_int8(features):
    scales = np.abs(features).max(axis=2, keepdims=True) / 127
    return np.rint(features / scales) * scales


def errors(features, stored, outliers):
    ordinary = np.delete(np.arange(features.shape[2]), outliers)
    off = stored.astype(np.float32) - features
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = np.linalg.norm(off, axis=(0, 1)) / np.linalg.norm(features, axis=(0, 1))
        dots = np.einsum("tpc,tpc->tp", features, stored.astype(np.float32))
        cosine = dots / np.linalg.norm(features, axis=2) / np.linalg.norm(stored.astype(np.float32), axis=2)
    return {
        "relative_l2": float(np.linalg.norm(off) / np.linalg.norm(features)),
        "inside_ordinary_channels": float(np.nanmedian(inside[ordinary])),
        "cosine_min": float(np.nanmin(cosine)),
    }


def through_cache(features, storage, folder, repeat):
    cache = FeatureCache.create_or_open(folder, Fingerprint(fields={"storage": storage}))
    times_s, targets = np.arange(float(len(features))), np.zeros((len(features), 1), np.float32)
    spent = {"encode": [], "read": []}
    for _ in range(repeat):
        started = time.perf_counter()
        STORAGE_TYPES[storage].encode(features, video="v", times_s=times_s)
        spent["encode"].append(time.perf_counter() - started)
    record = cache.write_video("v", times_s=times_s, features=features, targets=targets)
    for _ in range(repeat + 1):
        started = time.perf_counter()
        read = cache.read("v", times_s, targets=False).features
        spent["read"].append(time.perf_counter() - started)
    size = sum(array.num_bytes for name, array in record.arrays.items() if name in ("features", "scales"))
    seconds = {"encode_s": min(spent["encode"]), "read_s": min(spent["read"][1:])}
    return widen(read), {"bytes_per_value": size / features.size, **seconds}


def windows(frames, patches, channels, repeat):
    """Seconds per window of 100 frames, by kind of store."""
    numbers = np.random.default_rng(0)
    length, starts = frames + frames // 2, numbers.integers(0, frames // 2, 4)
    features = numbers.standard_normal((length, patches, channels), dtype=np.float32).astype(np.float16)
    times_s, targets = np.arange(float(length)), np.zeros((length, 1), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache.create_or_open(Path(folder, ZARR), Fingerprint(fields={"storage": "float16"}))
        for video in ("a", "b"):
            cache.write_video(video, times_s=times_s, features=features, targets=targets)
        np.save(Path(folder, "plain.npy"), features)
        mapped = np.load(Path(folder, "plain.npy"), mmap_mode="r")
        ways = {"memory-mapped .npy": lambda _, start: np.array(mapped[start : start + frames])}
        for kind in KINDS:
            if kind != ZARR:
                convert(cache, Path(folder, kind), kind, shard_bytes=10**9, on_video=lambda: None)
            store = FeatureCache.open(Path(folder, kind))
            ways[kind] = lambda video, start, store=store: store.read(
                video, times_s[start : start + frames], targets=False
            )
        spent = {name: [] for name in ways}
        for _ in range(repeat):
            for name, way in ways.items():
                started = time.perf_counter()
                for start in starts:
                    for video in ("a", "b"):
                        way(video, start)
                spent[name].append((time.perf_counter() - started) / (2 * len(starts)))
    least = {name: min(seconds) for name, seconds in spent.items()}
    plain = least["memory-mapped .npy"]
    return {name: {"seconds": value, "relative": value / plain} for name, value in least.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--patches", type=int, default=257)
    parser.add_argument("--channels", type=int, default=1408)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--source", default="bundled:tiny-instructblip")
    parser.add_argument("--videos", type=int, default=4)
    arguments = parser.parse_args()
    data = drawn(arguments.frames, arguments.patches, arguments.channels)
    data["encoder"] = encoded(arguments.source, arguments.videos)
    rows = []
    for name, (features, outliers) in data.items():
        facts = {"features": name, "shape": list(features.shape), "outlier_channels": len(outliers)}
        for storage in STORAGE_TYPES:
            with tempfile.TemporaryDirectory() as folder:
                stored, costs = through_cache(features, storage, Path(folder), arguments.repeat)
            rows.append({**facts, "storage": storage, **errors(features, stored, outliers), **costs})
        wrong = per_token_int8(features)
        rows.append({**facts, "storage": "int8, scale per token", **errors(features, wrong, outliers)})
        for row in rows[-len(STORAGE_TYPES) - 1 :]:
            figures = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
            print(f"{name:9} {row['storage']:22} {figures}", flush=True)
    reads = windows(arguments.frames, arguments.patches, arguments.channels, arguments.repeat + 2)
    for name, row in reads.items():
        print(f"window of {arguments.frames} frames  {name:20} {row['seconds']:.4f} s  {row['relative']:.2f}")
    hardware = {
        "cpu_cores": os.cpu_count(),
        "machine": platform.machine(),
        "numpy": np.__version__,
        "load": os.getloadavg(),
    }
    peaks = {name: float(np.abs(features).max()) for name, (features, _) in data.items()}
    result = {
        "hardware": hardware,
        "encoder": arguments.source,
        "largest_magnitude": peaks,
        "rows": rows,
        "windows": reads,
    }
    write_result("storage", result)


if __name__ == "__main__":
    main()
