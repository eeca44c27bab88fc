"""What an extraction will take: counts and bytes exactly, times measured with the real worker."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from pipeline.doctor.machine import absent_downloads, check_weights
from pipeline.screen.console import print_answer, progress_bar, say, table
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.cache.storage import STORAGE_FIELD
from stages.data.frame_plan import FramePlan, plan_frames
from stages.data.manifest import Manifest
from stages.data.video_paths import join_video_path
from stages.errors import UserError
from stages.extract.calibration import Calibration, calibrate
from stages.extract.estimate import (
    CacheState,
    DiskRoom,
    VideoSize,
    bytes_left,
    cache_state,
    count_windows,
    disk_room,
    total_bytes,
    video_sizes,
)
from stages.extract.worker import ExtractionJob, VideoTask
from stages.files import nearest_existing
from stages.frozen.identity import feature_fields, settle_precision
from stages.frozen.load import teacher_sources
from stages.frozen.shapes import FrameShape, frame_shape
from stages.urls import is_url
from stages.wording import byte_size, counted, rough_time

_STAGES = ("decode", "networks", "write", "total")
# So many videos that the calibration could not decode are named.
_NAMED_FAILURES = 3


@dataclass(frozen=True)
class Survey:
    """What follows from annotations, configuration files and the cache's records, exactly.

    Attributes:
        found: the planned videos whose files are there.
        remote: planned videos that are addresses and were not looked at.
        absent: checkpoints whose weights are not whole on this machine, and what is wrong with each.
        downloads: bytes of each checkpoint, of both stages, that would have to be fetched, None where not known.
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
    absent: dict[str, str]
    downloads: dict[str, int | None]

    @property
    def frames_left(self) -> int:
        """Frames that are not cached yet."""
        return sum(work.frames for work in self.state.work.values())


def look(config: PipelineConfig, *, retry_failed: bool, refresh_changed: bool) -> Survey:
    """Read annotations, configuration files and the cache's records.

    Args:
        config: as `pipeline extract` gets it.
        retry_failed: whether videos that failed before count as left.
        refresh_changed: whether videos whose files have changed do.

    Raises:
        UserError: whatever `pipeline extract` refuses.
    """
    config = config.model_copy(update={"extract": settle_precision(config.extract)})
    # A videos' folder that was named must be there.
    folder = locations.videos_folder(config)
    there = folder is not None and (config.data.videos is not None or folder.is_dir())
    manifest = locations.manifest_of(config, with_videos=there)
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
    sources = {f"teacher.{setting}": source for setting, source in teacher_sources(config.teacher).items()}
    sources["encoder.source"] = config.encoder.source
    bad = (finding for finding in check_weights(config) if finding.item in sources and finding.status != "ok")
    absent = {sources[finding.item]: finding.detail for finding in bad}
    remote, downloads = plan.num_videos - len(local), absent_downloads(config)
    return Survey(config, manifest, plan, shape, sizes, state, disk, found, remote, absent, downloads)


def measure(survey: Survey, seconds: float | None) -> tuple[Calibration | None, str]:
    """The calibration, or why there is none."""
    if seconds is None:
        return None, "not asked for"
    if not survey.found:
        return None, "none of the planned videos is on this machine"
    if survey.absent:
        return None, f"weights are not on this machine: {next(iter(survey.absent.values()))}"
    config, root = survey.config, locations.cache_root(survey.config)
    # Beside the cache, never in it, and on its disk; the writing into an object store is not measured.
    beside = nearest_existing(root.resolve().parent if isinstance(root, Path) else Path(tempfile.gettempdir()))
    clock_fps = locations.card_of(config).frame_rule.index_fps
    job = ExtractionJob(config.encoder, config.teacher, config.extract, "", clock_fps)
    say(f"measuring this machine for {seconds:g} s; --no-calibrate leaves it out")
    with progress_bar("calibrate", ceil(seconds), "second") as bar:
        shown = 0

        def on_step(elapsed_s: float, note: str) -> None:
            nonlocal shown
            steps = max(0, round(elapsed_s) - shown)
            shown += steps
            bar.advance(steps, note)

        try:
            measured = calibrate(job, survey.found, seconds=seconds, beside=beside, on_step=on_step)
        except UserError as error:
            return None, str(error)
        bar.advance(ceil(seconds) - shown, "")
    return measured, ""


# --- for machines


def extraction_json(survey: Survey, measured: Calibration | None, why_not: str) -> dict[str, Any]:
    """The answer for machines; `why_not` is why nothing was measured."""
    config, state, plan = survey.config, survey.state, survey.plan
    lengths = [len(times) for times in plan.times_s.values()]
    exported = total_bytes(survey.sizes, lengths, zarr=False)
    stored = total_bytes(survey.sizes, lengths, zarr=True)
    return {
        "dataset": survey.manifest.dataset,
        "task": config.data.task,
        "preset": config.preset,
        "videos": plan.num_videos,
        "videos_found": len(survey.found),
        "videos_remote": survey.remote,
        "samples": len(survey.manifest.samples),
        "windows": count_windows(survey.manifest),
        "frames": plan.num_frames,
        "splits": survey.manifest.splits,
        "frame": asdict(survey.shape),
        "downloads": survey.downloads,
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
            "frames": survey.frames_left,
            "bytes": bytes_left(survey.sizes, state.work),
            **_times(measured, survey.frames_left),
        },
        "calibration": None if measured is None else asdict(measured),
        "not_calibrated": why_not or None,
        "disk": None if survey.disk is None else {**asdict(survey.disk), "enough": survey.disk.enough},
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


def show_extraction(survey: Survey, measured: Calibration | None, why_not: str) -> None:
    """The answer for people; `why_not` is why nothing was measured."""
    config, manifest, plan, state = survey.config, survey.manifest, survey.plan, survey.state
    print_answer(
        f"{manifest.dataset}, {config.data.task if config.data.task != 'all' else 'all tasks'}, preset "
        f"{config.preset}: {counted(plan.num_videos, 'video')}, {counted(len(manifest.samples), 'sample')} "
        f"({', '.join(manifest.splits)}) on {counted(count_windows(manifest), 'window')}, "
        f"{counted(plan.num_frames, 'distinct frame')}"
    )
    for split, file in manifest.absent_splits.items():
        print_answer(f"  without {split}: no file {file}")
    remote = f", {counted(survey.remote, 'more is an address', 'more are addresses')}" if survey.remote else ""
    print_answer(f"videos: {len(survey.found):,} found in {locations.videos_root(config)}{remote}")
    print_answer(
        f"cache:  {state.done:,} done, {state.failed:,} failed, {state.pending:,} pending in "
        f"{locations.cache_root(config)}; left: {counted(len(state.work), 'video')}, "
        f"{counted(survey.frames_left, 'frame')}"
    )
    shape = survey.shape
    print_answer(f"frame:  features {shape.tokens} x {shape.width}, y* {shape.teacher_width}")
    show_assumed(shape.assumed)
    show_downloads(survey.downloads)
    _show_bytes(survey)
    if measured is None:
        print_answer(f"times: unknown, decoding too: {why_not}")
    else:
        _show_times(measured, plan.num_frames, survey.frames_left)
    _show_disk(survey)


def show_assumed(checkpoints: Sequence[str]) -> None:
    """Whose published sizes were taken, for people."""
    if checkpoints:
        print_answer(f"  published sizes, because this machine has no {' and no '.join(checkpoints)} yet")


def show_downloads(downloads: Mapping[str, int | None]) -> None:
    """What would have to be fetched, for people."""
    if downloads:
        weigh = {name: "size unknown" if size is None else byte_size(size) for name, size in downloads.items()}
        named = ", ".join(f"{name} ({size})" for name, size in weigh.items())
        print_answer(f"to be downloaded: {named}; plan fetches nothing")


def _show_bytes(survey: Survey) -> None:
    lengths = [len(times) for times in survey.plan.times_s.values()]
    stored, exported = (total_bytes(survey.sizes, lengths, zarr=zarr) for zarr in (True, False))
    left = bytes_left(survey.sizes, survey.state.work)
    rows = [
        (
            f"{name} (chosen)" if name == survey.config.extract.storage else name,
            byte_size(stored[name]),
            byte_size(left[name]),
            byte_size(exported[name]),
        )
        for name in survey.sizes
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
        "decode": f"{counted(measured.decode.frames, 'frame')} of {counted(measured.videos, 'video')}",
        "networks": f"{counted(measured.networks.frames, 'frame')}, {measured.batch_frames} at once",
        "write": counted(measured.write.frames, "frame"),
        "total": "",
    }
    rows = [
        (stage, rates[stage], rests_on[stage], rough_time(whole[stage]), rough_time(left[stage])) for stage in _STAGES
    ]
    table("time on this machine, start-up not counted", ("stage", "measured", "on", "all", "left"), rows)
    if measured.is_gpu:
        used, rest = (_times(measured, count)["gpu_hours"] for count in (frames, frames_left))
        print_answer(
            f"GPU-hours of {measured.device}: {used:,.2f}, left {rest:,.2f}; {frames / used:,.0f} frames a GPU-hour"
        )
    for video, reason in list(measured.failed.items())[:_NAMED_FAILURES]:
        print_answer(f"could not be decoded: {video}: {reason}")
    if len(measured.failed) > _NAMED_FAILURES:
        print_answer(
            f"... and {len(measured.failed) - _NAMED_FAILURES} more of {measured.videos + len(measured.failed)} tried"
        )


def _show_disk(survey: Survey) -> None:
    disk, storage = survey.disk, survey.config.extract.storage
    if disk is None:
        return
    if disk.enough:
        free, needed = byte_size(disk.free_bytes), byte_size(disk.needed_bytes)
        print_answer(f"disk: {free} free at {disk.folder}, {needed} needed as {storage}")
        return
    fitting = [name for name, need in bytes_left(survey.sizes, survey.state.work).items() if need <= disk.free_bytes]
    smaller = f", or a smaller type (--set extract.storage={fitting[0]})" if fitting else ""
    say(
        f"WARNING: the disk is too small: {disk.free_bytes:,} bytes free at {disk.folder}, {disk.needed_bytes:,} bytes "
        f"needed as {storage}. Free some space, or choose another disk with --cache{smaller}"
    )


def _rate(seconds_per_frame: float) -> str:
    return f"{1 / seconds_per_frame:,.3g} frames/s"
