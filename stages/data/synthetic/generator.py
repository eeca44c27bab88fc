"""Writes the synthetic videos and annotations into a folder, several videos at a time, byte for byte repeatable."""

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import av
import numpy as np

from stages.atomic import atomic_path, atomic_write_text
from stages.data.manifest import SPLITS
from stages.data.synthetic.drawing import SIZE_PX, draw_frames
from stages.data.synthetic.plan import FPS, VideoSpec, annotations_of, plan_videos
from stages.errors import UserError
from stages.signals import left_to_this_process

GENERATOR_VERSION = 2  # raise it whenever a drawn pixel, a label or a length changes
DEFAULT_VIDEOS_PER_SPLIT: Mapping[str, int] = MappingProxyType({"train": 480, "val": 48, "test": 96})

_RECORD_FILE = "generated.json"
# Our own videos and the temporary files that a kill left behind; nothing else in the folder is ever deleted.
_OWN_FILE = re.compile(r"(?:train|val|test)_\d{4,}\.mp4|\.(?:train|val|test)_\d{4,}\.mp4\.\w+\.tmp")


@dataclass(frozen=True)
class SyntheticSummary:
    """What is in the folder: number, total length and total size of the videos; `reused` when it was there before."""

    folder: Path
    videos: int
    duration_s: int
    size_bytes: int
    reused: bool


def generate(
    folder: Path,
    *,
    seed: int = 0,
    videos_per_split: Mapping[str, int] = DEFAULT_VIDEOS_PER_SPLIT,
    workers: int | None = None,
    on_video: Callable[[int, int], None] | None = None,
) -> SyntheticSummary:
    """Write `folder/videos/<id>.mp4` and `folder/annotations/<split>.json`; return at once if they are there.

    A record file is written last. A folder without it, or with another seed, size or generator version, is written
    again; each file is replaced in one step, so no video is ever half-written under its name.

    Args:
        seed: the same seed gives byte-identical files (with the same x264 and numpy).
        workers: processes; None: one per core.
        on_video: called with (videos written, videos in all) after each.

    Raises:
        UserError: a split's name or size makes no sense.
    """
    _check_sizes(seed, videos_per_split)
    specs = plan_videos(seed, videos_per_split)
    request = {"generator_version": GENERATOR_VERSION, "seed": seed, "videos_per_split": dict(videos_per_split)}
    record_path = folder / _RECORD_FILE
    reused = _is_finished(folder, specs, request)
    if not reused:
        record_path.unlink(missing_ok=True)
        _remove_own_files(folder / "videos", keep={_video_name(spec) for spec in specs})
        for done, _ in enumerate(_write_videos(folder / "videos", specs, workers), start=1):
            if on_video is not None:
                on_video(done, len(specs))
        for split in videos_per_split:
            atomic_write_text(folder / "annotations" / f"{split}.json", _json(annotations_of(specs, split)))
        atomic_write_text(record_path, _json(request))
    return SyntheticSummary(
        folder=folder,
        videos=len(specs),
        duration_s=sum(spec.duration_s for spec in specs),
        size_bytes=sum((folder / "videos" / _video_name(spec)).stat().st_size for spec in specs),
        reused=reused,
    )


def _check_sizes(seed: int, videos_per_split: Mapping[str, int]) -> None:
    if seed < 0:
        raise UserError("the seed of the synthetic set must not be negative", received=seed)
    for split, count in videos_per_split.items():
        if split not in SPLITS or count < 1:
            raise UserError(
                "cannot make this split of the synthetic set",
                received=f"{split}: {count}",
                allowed=f"{', '.join(SPLITS)} with at least 1 video each",
            )


def _is_finished(folder: Path, specs: list[VideoSpec], request: dict[str, Any]) -> bool:
    try:
        record = json.loads((folder / _RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: write everything again
        return False
    present = {path.name for path in (folder / "videos").glob("*.mp4")}
    annotated = all((folder / "annotations" / f"{split}.json").is_file() for split in request["videos_per_split"])
    return record == request and annotated and present >= {_video_name(spec) for spec in specs}


def _remove_own_files(videos: Path, keep: set[str]) -> None:
    for path in videos.glob("*") if videos.is_dir() else ():
        if _OWN_FILE.fullmatch(path.name) and path.name not in keep:
            path.unlink()


def _write_videos(videos: Path, specs: list[VideoSpec], workers: int | None) -> Iterator[None]:
    """Write every video, yielding once after each."""
    count = min(workers or os.cpu_count() or 1, len(specs))
    if count == 1:
        for spec in specs:
            write_video(videos / _video_name(spec), spec)
            yield
        return
    # "spawn": forking a process that already runs threads (torch, a progress bar) can deadlock the child.
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        with left_to_this_process():
            tasks = [pool.submit(write_video, videos / _video_name(spec), spec) for spec in specs]
        for task in as_completed(tasks):
            task.result()
            yield
    finally:
        pool.shutdown(cancel_futures=True)


def write_video(path: Path, spec: VideoSpec) -> None:
    """Draw one video and write it as H.264 in mp4 (yuv420p, 112 x 112 px, 10 fps), replacing `path` in one step."""
    frames = draw_frames(spec.labels, spec.seed, np.arange(spec.num_frames) / FPS)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        container.flags |= av.container.Flags.bitexact.value  # no encoder version, no time of day
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = SIZE_PX
        stream.pix_fmt = "yuv420p"
        # One thread, because with more the bytes depend on timing. No macroblock tree: on frames this narrow its
        # assembly reads past a row, so the bytes depend on what memory held before (seen with MALLOC_PERTURB_).
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "18", "g": "30", "x264-params": "mbtree=0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _video_name(spec: VideoSpec) -> str:
    return f"{spec.id}.mp4"


def _json(content: object) -> str:
    return f"{json.dumps(content, indent=1)}\n"
