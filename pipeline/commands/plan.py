"""`pipeline plan` and `pipeline extract --dry-run`: what an extraction will take, before anything runs."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from pipeline import locations
from pipeline.config import PipelineConfig, Resolved
from pipeline.console import emit_json, emit_json_line, progress_bar, say, table
from stages.cache.storage import STORAGE_FIELD
from stages.calibration import Calibration, calibrate
from stages.errors import UserError
from stages.extraction import feature_fields, settle_precision
from stages.frame_plan import FramePlan, plan_frames
from stages.manifest import Manifest
from stages.planning import (
    CacheState,
    DiskRoom,
    FrameShape,
    VideoSize,
    bytes_left,
    cache_state,
    count_windows,
    disk_room,
    frame_shape,
    nearest_folder,
    total_bytes,
    video_sizes,
)
from stages.video_paths import is_url, join_video_path
from stages.worker import VideoTask

_STAGES = ("decode", "networks", "write", "total")
# So many videos that the calibration could not decode are named.
_NAMED_FAILURES = 3


def run(
    resolved: Resolved,
    *,
    calibrate_s: float | None,
    retry_failed: bool,
    as_json: bool,
    refresh_changed: bool = False,
    as_lines: bool = False,
) -> None:
    """Print what the extraction of the configured data set takes.

    Args:
        resolved: the configuration, as `pipeline extract` gets it.
        calibrate_s: seconds of decoding, encoding and writing to measure; None: no times are told.
        retry_failed: whether videos that failed before count as left.
        as_json: print one object on stdout, too.
        refresh_changed: whether videos whose files have changed count as left.
        as_lines: print it on one line, as an event.
    """
    if calibrate_s is not None and not 0 < calibrate_s < float("inf"):
        raise UserError(
            "not a time to measure for", where="--calibrate-s", received=calibrate_s, allowed="seconds, more than 0"
        )
    counted = _count(resolved.config, retry_failed=retry_failed, refresh_changed=refresh_changed)
    measured, why_not = _measure(counted, calibrate_s)
    content = _as_json(counted, measured, why_not)
    if as_lines:
        emit_json_line({"event": "plan", **content})
    elif as_json:
        emit_json(content)
    _show(counted, measured, why_not)


@dataclass(frozen=True)
class _Counted:
    """What follows from annotations, configuration files and the cache's records, exactly.

    Attributes:
        found: the planned videos whose files are there.
        remote: planned videos that are addresses and were not looked at.
    """

    config: PipelineConfig
    manifest: Manifest
    plan: FramePlan
    shape: FrameShape
    sizes: dict[str, VideoSize]
    state: CacheState
    disk: DiskRoom | None
    found: list[VideoTask]
    remote: int

    @property
    def frames_left(self) -> int:
        return sum(work.frames for work in self.state.work.values())


def _count(config: PipelineConfig, *, retry_failed: bool, refresh_changed: bool) -> _Counted:
    config = config.model_copy(update={"extract": settle_precision(config.extract)})
    manifest = _manifest(config)
    plan = plan_frames(manifest)
    shape = frame_shape(config)
    wanted = {
        **feature_fields(config),
        "precision": config.extract.precision,
        STORAGE_FIELD: config.extract.storage,
    }
    videos, protocols = locations.videos_root(config), config.extract.protocols

    def place_of(video: str) -> str:
        return join_video_path(videos, manifest.videos[video].path, protocols, video=video)

    root = locations.cache_root(config)
    state = cache_state(root, plan, wanted, place_of, retry_failed=retry_failed, refresh_changed=refresh_changed)
    sizes = video_sizes(shape)
    # An object store does not say how much room it has.
    needed_bytes = bytes_left(sizes, state.work)[config.extract.storage]
    disk = disk_room(root, needed_bytes) if isinstance(root, Path) else None
    tasks = [VideoTask(video, place_of(video), times_s) for video, times_s in plan.times_s.items()]
    local = [task for task in tasks if not is_url(task.path)]
    found = [task for task in local if Path(task.path).is_file()]
    return _Counted(config, manifest, plan, shape, sizes, state, disk, found, plan.num_videos - len(local))


def _manifest(config: PipelineConfig) -> Manifest:
    """With the videos' folder where there is one; a folder that was named must be there."""
    folder = locations.videos_folder(config)
    there = folder is not None and (config.data.videos is not None or folder.is_dir())
    return locations.manifest_of(config, with_videos=there)


def _measure(counted: _Counted, seconds: float | None) -> tuple[Calibration | None, str]:
    """The calibration, or why there is none."""
    if seconds is None:
        return None, "not asked for"
    if not counted.found:
        return None, "none of the planned videos is on this machine"
    config, root = counted.config, locations.cache_root(counted.config)
    # Beside the cache, never in it, and on its disk; the writing into an object store is not measured.
    beside = nearest_folder(root.resolve().parent if isinstance(root, Path) else Path(tempfile.gettempdir()))
    say(f"measuring this machine for {seconds:g} s; --no-calibrate leaves it out")
    with progress_bar("calibrate", ceil(seconds), "s") as bar:
        shown = 0

        def on_step(elapsed_s: float, note: str) -> None:
            nonlocal shown
            steps = max(0, round(elapsed_s) - shown)
            shown += steps
            bar.advance(steps, note)

        try:
            measured = calibrate(config, config.extract, counted.found, seconds=seconds, beside=beside, on_step=on_step)
        except UserError as error:
            return None, str(error)
        bar.advance(ceil(seconds) - shown, "")
    return measured, ""


# --- for machines


def _as_json(counted: _Counted, measured: Calibration | None, why_not: str) -> dict[str, Any]:
    config, state, plan = counted.config, counted.state, counted.plan
    lengths = [len(times) for times in plan.times_s.values()]
    exported = total_bytes(counted.sizes, lengths, zarr=False)
    stored = total_bytes(counted.sizes, lengths, zarr=True)
    return {
        "dataset": counted.manifest.dataset,
        "task": config.data.task,
        "preset": config.preset,
        "videos": plan.num_videos,
        "videos_found": len(counted.found),
        "videos_remote": counted.remote,
        "samples": len(counted.manifest.samples),
        "windows": count_windows(counted.manifest),
        "frames": plan.num_frames,
        "splits": counted.manifest.splits,
        "frame": asdict(counted.shape),
        "storage": config.extract.storage,
        "bytes": stored,
        "bytes_by_backend": {"zarr": stored, "webdataset": exported, "hdf5": exported},
        **_times(measured, plan.num_frames),
        "cache": {
            "root": str(locations.cache_root(config)),
            "done": state.done,
            "failed": state.failed,
            "pending": state.pending,
        },
        "left": {
            "videos": len(state.work),
            "frames": counted.frames_left,
            "bytes": bytes_left(counted.sizes, state.work),
            **_times(measured, counted.frames_left),
        },
        "calibration": None if measured is None else asdict(measured),
        "not_calibrated": why_not or None,
        "disk": None if counted.disk is None else {**asdict(counted.disk), "enough": counted.disk.enough},
    }


def _times(measured: Calibration | None, frames: int) -> dict[str, Any]:
    """Seconds of decoding on one core, of each stage on this machine, and hours of its GPUs (None on a CPU)."""
    if measured is None:
        return {"decode_s": None, "seconds": None, "hours": None, "gpu_hours": None}
    seconds = measured.seconds(frames)
    hours = seconds.total / 3600
    return {
        "decode_s": frames * measured.decode.seconds_per_frame,
        "seconds": asdict(seconds),
        "hours": hours,
        "gpu_hours": hours * measured.devices if measured.is_gpu else None,
    }


# --- for people


def _show(counted: _Counted, measured: Calibration | None, why_not: str) -> None:
    config, manifest, plan, state = counted.config, counted.manifest, counted.plan, counted.state
    say(
        f"{manifest.dataset}, {config.data.task if config.data.task != 'all' else 'all tasks'}, preset "
        f"{config.preset}: {plan.num_videos:,} videos, {len(manifest.samples):,} samples ({', '.join(manifest.splits)})"
        f" on {count_windows(manifest):,} windows, {plan.num_frames:,} distinct frames"
    )
    for split, file in manifest.absent_splits.items():
        say(f"  without {split}: no file {file}")
    remote = f", {counted.remote:,} more are addresses" if counted.remote else ""
    say(f"videos: {len(counted.found):,} found in {locations.videos_root(config)}{remote}")
    say(
        f"cache:  {state.done:,} done, {state.failed:,} failed, {state.pending:,} pending in "
        f"{locations.cache_root(config)}; left: {len(state.work):,} videos, {counted.frames_left:,} frames"
    )
    shape = counted.shape
    say(f"frame:  features {shape.tokens} x {shape.width}, y* {shape.teacher_width}")
    if shape.assumed:
        say(f"  published sizes, because this machine has no {' and no '.join(shape.assumed)} yet")
    _show_bytes(counted)
    if measured is None:
        say(f"times: unknown, decoding too: {why_not}")
    else:
        _show_times(measured, plan.num_frames, counted.frames_left)
    _show_disk(counted)


def _show_bytes(counted: _Counted) -> None:
    lengths = [len(times) for times in counted.plan.times_s.values()]
    stored, exported = (total_bytes(counted.sizes, lengths, zarr=zarr) for zarr in (True, False))
    left = bytes_left(counted.sizes, counted.state.work)
    rows = [
        (
            f"{name} (chosen)" if name == counted.config.extract.storage else name,
            _bytes(stored[name]),
            _bytes(left[name]),
            _bytes(exported[name]),
        )
        for name in counted.sizes
    ]
    table("size by extract.storage", ("storage type", "Zarr", "of it left", "WebDataset, HDF5"), rows)


def _show_times(measured: Calibration, frames: int, frames_left: int) -> None:
    whole, left = asdict(measured.seconds(frames)), asdict(measured.seconds(frames_left))
    rates = {
        "decode": f"{_rate(measured.decode.seconds_per_frame)} in each of {measured.decode_children} decode children",
        "networks": f"{_rate(measured.networks.seconds_per_frame)} on each of {measured.devices} {measured.device}",
        "write": _rate(measured.write.seconds_per_frame),
        "total": "the slowest decides" if measured.is_gpu else "cores are shared",
    }
    rests_on = {
        "decode": f"{measured.decode.frames:,} frames of {measured.videos} videos",
        "networks": f"{measured.networks.frames:,} frames, {measured.batch_frames} at once",
        "write": f"{measured.write.frames:,} frames",
        "total": "",
    }
    rows = [(stage, rates[stage], rests_on[stage], _time(whole[stage]), _time(left[stage])) for stage in _STAGES]
    table("time on this machine, start-up not counted", ("stage", "measured", "on", "all", "left"), rows)
    if measured.is_gpu:
        used, rest = (_times(measured, count)["gpu_hours"] for count in (frames, frames_left))
        say(f"GPU-hours of {measured.device}: {used:,.2f}, left {rest:,.2f}; {frames / used:,.0f} frames a GPU-hour")
    for video, reason in list(measured.failed.items())[:_NAMED_FAILURES]:
        say(f"could not be decoded: {video}: {reason}")
    if len(measured.failed) > _NAMED_FAILURES:
        say(f"... and {len(measured.failed) - _NAMED_FAILURES} more of {measured.videos + len(measured.failed)} tried")


def _show_disk(counted: _Counted) -> None:
    disk, storage = counted.disk, counted.config.extract.storage
    if disk is None:
        return
    if disk.enough:
        say(f"disk: {_bytes(disk.free_bytes)} free at {disk.folder}, {_bytes(disk.needed_bytes)} needed as {storage}")
        return
    fitting = [name for name, need in bytes_left(counted.sizes, counted.state.work).items() if need <= disk.free_bytes]
    smaller = f", or a smaller type (--set extract.storage={fitting[0]})" if fitting else ""
    say(
        f"WARNING: the disk is too small: {disk.free_bytes:,} bytes free at {disk.folder}, {disk.needed_bytes:,} bytes "
        f"needed as {storage}. Free some space, or choose another disk with --cache{smaller}"
    )


def _rate(seconds_per_frame: float) -> str:
    return f"{1 / seconds_per_frame:,.3g} frames/s"


def _bytes(count: float) -> str:
    return _scaled(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def _time(seconds: float) -> str:
    return _scaled(seconds, (("d", 86400.0), ("h", 3600.0), ("min", 60.0)), "s")


def _scaled(value: float, units: Sequence[tuple[str, float]], smallest: str) -> str:
    name, size = next(((name, size) for name, size in units if value >= size), (smallest, 1.0))
    return f"{value / size:,.1f} {name}"
