"""`pipeline extract`: Stage 1."""

import time
from collections.abc import Callable
from dataclasses import asdict

from pipeline import locations
from pipeline.config import PipelineConfig, Resolved
from pipeline.console import PEOPLE, emit_json, emit_json_line, progress_bar, say
from stages.cache.feature_cache import FeatureCache
from stages.cache.places import CacheUrl
from stages.extraction import Extraction, ExtractionProgress, ExtractionSummary, fingerprint, settle_precision
from stages.frame_plan import plan_frames
from stages.stop import GO_ON, telling
from stages.weights import LoadingReport
from stages.worker import ExtractionJob, VideoOutcome

# So many failed videos are named in the summary; the ledger has them all.
_NAMED_FAILURES = 10

# Progress events for machines come at most this often, and lines for people where there is no terminal.
_EVENT_EVERY_S = 1.0
_LINE_EVERY_S = 60.0

_OnOutcome = Callable[[VideoOutcome, ExtractionProgress], None]


def run(resolved: Resolved, *, address: str | None, retry_failed: bool, as_json: bool, as_lines: bool = False) -> bool:
    """Extract, print the summary, and say whether any planned video has failed.

    Args:
        resolved: the configuration.
        address: Ray cluster; None: one on this machine.
        retry_failed: try videos again that failed before.
        as_json: print the summary as one JSON object on stdout.
        as_lines: print an object per event while it runs, and the summary as the last line.

    Raises:
        KeyboardInterrupt: a signal has come; what is committed stays.
    """
    config = resolved.config
    extraction = _prepare(config, retry_failed=retry_failed)
    summary = _run(extraction, address, _emit_events() if as_lines else lambda _outcome, _progress: None)
    content = {**asdict(summary), "cache": str(locations.cache_root(config))}
    if as_lines:
        emit_json_line({"event": "summary", **content})
    elif as_json:
        emit_json(content)
    _say_summary(summary, config)
    return bool(summary.failed)


def _prepare(config: PipelineConfig, *, retry_failed: bool) -> Extraction:
    manifest = locations.manifest_of(config, with_videos=True)
    plan = plan_frames(manifest)
    root = locations.cache_root(config)
    extract = settle_precision(config.extract)
    reports: list[LoadingReport] = []
    identity = fingerprint(config, extract, reports.append)
    cache = FeatureCache.create_or_open(root, identity, extract_command=locations.extract_command(config))
    for report in reports:
        say(report.summary())
    place = root if isinstance(root, CacheUrl) else root.resolve()
    job = ExtractionJob(config.encoder, config.teacher, extract, str(place))
    videos = locations.videos_root(config)
    return Extraction(manifest, plan, cache, job, videos=videos, retry_failed=retry_failed)


def _run(extraction: Extraction, address: str | None, emit: _OnOutcome) -> ExtractionSummary:
    if not extraction.todo:
        return extraction.run(lambda _tasks: iter(()), emit)
    say(f"extracting {len(extraction.todo)} of {extraction.plan.num_videos} videos; starting Ray and the networks")
    # Ray takes seconds to import; a finished extraction never gets here.
    from stages.ray_flow import cluster, process_all

    planned, left = extraction.plan.num_videos, len(extraction.todo)
    done = len(extraction.before.done)
    say_now_and_then = _every(_LINE_EVERY_S)
    with (
        progress_bar("extract", planned, "videos", done=planned - left) as bar,
        telling(lambda: f"; {done} of {planned} videos done; {GO_ON}"),
        cluster(address),
    ):

        def on_outcome(outcome: VideoOutcome, progress: ExtractionProgress) -> None:
            nonlocal done
            done = progress.done
            emit(outcome, progress)
            bar.advance(note=_note(progress))
            if not PEOPLE.is_terminal and say_now_and_then():
                say(f"{progress.done} of {planned} videos done, {_note(progress)}, {_duration(progress.left_s)} left")

        return extraction.run(lambda tasks: process_all(tasks, extraction.job), on_outcome)


def _emit_events() -> _OnOutcome:
    """A line for each video that has ended and, now and then, one with the progress."""
    is_time = _every(_EVENT_EVERY_S)

    def emit(outcome: VideoOutcome, progress: ExtractionProgress) -> None:
        state = "done" if outcome.checksum is not None else "failed"
        facts = {"frames": outcome.frames, "decode_s": outcome.decode_s, "reason": outcome.reason}
        emit_json_line({"event": "video", "video": outcome.video, "state": state, **facts})
        if is_time() or not progress.left:
            emit_json_line({"event": "progress", **asdict(progress)})

    return emit


def _every(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since it last said yes."""
    last_s = time.monotonic()

    def is_time() -> bool:
        nonlocal last_s
        if time.monotonic() - last_s < seconds:
            return False
        last_s = time.monotonic()
        return True

    return is_time


def _note(progress: ExtractionProgress) -> str:
    parts = [f"{progress.frames} frames, {progress.frames_left} left"]
    if progress.frames_per_s is not None:
        parts.append(f"{progress.frames_per_s:.1f} frames/s")
    if progress.wait_share is not None:
        parts.append(f"networks wait {progress.wait_share:.0%}")
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    return ", ".join(parts)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _say_summary(summary: ExtractionSummary, config: PipelineConfig) -> None:
    for video, reason in list(summary.failed.items())[:_NAMED_FAILURES]:
        say(f"failed {video}: {reason}")
    if len(summary.failed) > _NAMED_FAILURES:
        say(f"... and {len(summary.failed) - _NAMED_FAILURES} more; the ledger in the cache names them all")
    now = f", {summary.extracted_now} of them now" if summary.extracted_now else ""
    say(
        f"{summary.done} of {summary.planned} videos done{now}, {len(summary.failed)} failed, "
        f"{summary.pending} pending; cache {locations.cache_root(config)}"
    )
    if summary.frames_now:
        say(
            f"{summary.frames_now} frames in {_duration(summary.seconds)} = {summary.frames_now / summary.seconds:.1f} "
            f"frames/s, start included; decoding {_duration(summary.decode_s)}, networks "
            f"{_duration(summary.networks_s)}, which waited {summary.wait_share or 0.0:.0%} of their time"
        )
    if summary.failed:
        say("try the failed ones again with --retry-failed")
