"""A corpus of many tiny clips for benchmarks: a few encoded files under as many names as are asked for."""

import json
import os

import av
import numpy as np

CARD = """\
name: many
title: Many tiny clips
annotations: {format: jsonl, file: many.jsonl}
videos: {pattern: "{id}.mp4"}
text: caption
tasks: {shade: {prompt: "{}", labels: [dark, light]}}
frame_rule: {kind: uniform, num_frames: 4, index_fps: 4}
"""
RATE_FPS = 4
FRAMES = 5  # the first of which has no meaning of its own: a clip's length is that of its other four
DISTINCT = 8


def write(folder, videos):
    """Card, annotations and `videos` clips of 64 x 64 below `folder`; returns the options that name them."""
    files = folder / "videos"
    files.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    originals = []
    for index in range(min(DISTINCT, videos)):
        path = files / f"v{index:05d}.mp4"
        _encode(path, numbers.integers(0, 256, (FRAMES, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2))
        originals.append(path)
    lines = []
    for index in range(videos):
        path = files / f"v{index:05d}.mp4"
        if index >= len(originals):
            os.link(originals[index % len(originals)], path)
        line = {"video": path.stem, "duration_s": FRAMES / RATE_FPS, "task": "shade", "question": "what is the shade?"}
        lines.append(json.dumps({**line, "answer": "dark", "split": "train"}))
    (folder / "many.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "many.yaml").write_text(CARD)
    return {"dataset": str(folder / "many.yaml"), "annotations": str(folder), "videos": str(files)}


def _encode(path, pictures):
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE_FPS, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
