"""`pipeline extract`: Stage 1."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from pipeline.runs.small_world import warn_of_unknown_data
from pipeline.screen.console import beside_json, emit_json, emit_json_line, print_answer, progress_bar, say
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig, Resolved
from stages.cache.feature_cache import FeatureCache
from stages.cache.files.places import CacheUrl
from stages.cache.ledger import LedgerStatus
from stages.cache.source import Changes, damaged_sentence, outdated_sentence
from stages.data.frame_plan import FramePlan, plan_frames
from stages.extract.extraction import Extraction, ExtractionProgress, ExtractionSummary
from stages.extract.worker import ExtractionJob, VideoOutcome
from stages.frozen.identity import fingerprint, settle_precision
from stages.pace import Pace
from stages.shard import Shard
from stages.signals import GO_ON, interruption_note
from stages.weights.repository import LoadingReport
from stages.wording import counted, duration, rate

# So many failed videos are named in the summary; the ledger has them all.
_NAMED_FAILURES = 10

# Progress events for machines come at most this often.
_EVENT_EVERY_S = 1.0

# Called with the progress, and with the outcome if a video has ended.
_OnProgress = Callable[[VideoOutcome | None, ExtractionProgress], None]


def run(
    resolved: Resolved,
    *,
    address: str | None,
    retry_failed: bool,
    as_json: bool,
    refresh_changed: bool = False,
    as_lines: bool = False,
    shard: Shard | None = None,
) -> bool:
    """Extract, print the summary, and return whether any planned video has failed.

    Args:
        resolved: the configuration.
        address: Ray cluster; None: one on this machine.
        retry_failed: try videos again that failed before.
        as_json: print the summary as one JSON object on stdout.
        refresh_changed: extract videos again whose files have changed, or may have.
        as_lines: print an object per event while it runs, and the summary as the last line.
        shard: the only one of the plan to extract, in this process; None: all of it, by Ray.

    Raises:
        KeyboardInterrupt: a signal has come; what is committed stays.
    """
    config = resolved.config
    extraction, plan = prepare_extraction(config, shard, retry_failed=retry_failed, refresh_changed=refresh_changed)
    warn_of_unknown_data(config)
    summary = _run(extraction, address, _emit_events() if as_lines else lambda _outcome, _progress: None)
    content = {**asdict(summary), "cache": str(locations.cache_root(config))}
    if shard is not None:
        content |= {"shard": str(shard), "all_shards": _states(extraction.cache.ledger.status(plan.times_s))}
    if as_lines:
        emit_json_line({"event": "summary", **content})
    elif as_json:
        emit_json(content)
    with beside_json(as_json or as_lines):
        _print_summary(summary, config)
        if shard is not None:
            print_answer(_all_shards_sentence(content["all_shards"]))
    return bool(summary.failed)


def prepare_extraction(
    config: PipelineConfig, shard: Shard | None = None, *, retry_failed: bool, refresh_changed: bool
) -> tuple[Extraction, FramePlan]:
    """Read annotations, identify the networks, open or make the cache: what is there to do, before any worker.

    Returns:
        The extraction of the shard (None: of everything), and the plan of all shards.
    """
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
    clock_fps = locations.card_of(config).frame_rule.index_fps
    job = ExtractionJob(config.encoder, config.teacher, extract, str(place), clock_fps)
    videos = locations.videos_root(config)
    extraction = Extraction(
        manifest,
        plan if shard is None else plan.of_shard(shard),
        cache,
        job,
        videos=videos,
        retry_failed=retry_failed,
        refresh_changed=refresh_changed,
        shard=shard,
    )
    _say_changes(extraction.changes, refresh_changed=refresh_changed)
    return extraction, plan


def _say_changes(changes: Changes, *, refresh_changed: bool) -> None:
    """One line on committed videos whose files are, or may be, others than then."""
    if not changes.outdated:
        return
    if refresh_changed:
        say(f"{outdated_sentence(changes)}; extracting them again")
    else:
        kept = "the cache keeps the old frames, --refresh-changed replaces them"
        say(f"warning: {outdated_sentence(changes)}; {kept}")


def _run(extraction: Extraction, address: str | None, emit: _OnProgress) -> ExtractionSummary:
    if not extraction.todo:
        return extraction.run(lambda _tasks: iter(()), emit)
    videos = counted(extraction.plan.num_videos, "video")
    shard = extraction.shard
    begun, started = ("", "Ray and ") if shard is None else (f"shard {shard}: ", "")
    say(f"{begun}extracting {len(extraction.todo)} of {videos}; starting {started}the networks")
    done = len(extraction.before.done.difference(extraction.todo))
    frames = sum(len(extraction.plan.times_s[video]) for video in extraction.todo)
    with (
        # Its pace begins with the first word of a worker: the start of Ray and the networks is none of it.
        progress_bar("extract", frames, "frame", pace=Pace()) as bar,
        interruption_note(lambda: f"; {done} of {videos} done; {GO_ON}"),
        _workers(address, here=shard is not None) as process_all,
    ):

        def on_outcome(outcome: VideoOutcome | None, progress: ExtractionProgress) -> None:
            nonlocal done
            done = progress.done
            emit(outcome, progress)
            # Of the planned frames some may be cached already.
            frames = progress.frames_planned
            bar.move_to(frames - progress.frames_left, _note(progress), total=frames)

        return extraction.run(
            lambda tasks: process_all(tasks, extraction.job, on_encoded=extraction.encoded),
            on_outcome,
            lambda progress: on_outcome(None, progress),
        )


@contextmanager
def _workers(address: str | None, *, here: bool) -> Iterator[Callable[..., Iterator[tuple[VideoOutcome, int]]]]:
    """What takes tasks to workers within the block: to one in this process, or to those on a Ray cluster."""
    if here:
        from stages.extract import in_process

        yield in_process.process_all
        return
    # Ray takes seconds to import; a finished extraction never gets here.
    from stages.cluster.connect import cluster
    from stages.extract import hand_out

    with cluster(address):
        yield hand_out.process_all


def _emit_events() -> _OnProgress:
    """A line for each video that has ended and, now and then, one with the progress."""
    is_time = _every(_EVENT_EVERY_S)

    def emit(outcome: VideoOutcome | None, progress: ExtractionProgress) -> None:
        if outcome is not None:
            state = "done" if outcome.checksum is not None else "failed"
            facts = {
                "frames": outcome.frames,
                "decode_s": outcome.decode_s,
                "reason": outcome.reason,
                "remark": outcome.remark,
            }
            emit_json_line({"event": "video", "video": outcome.video, "state": state, **facts})
        if is_time() or not progress.left:
            emit_json_line({"event": "progress", **asdict(progress)})

    return emit


def _every(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since it was last true."""
    last_s = time.monotonic()

    def is_time() -> bool:
        nonlocal last_s
        if time.monotonic() - last_s < seconds:
            return False
        last_s = time.monotonic()
        return True

    return is_time


def _note(progress: ExtractionProgress) -> str:
    parts = [f"{progress.done} of {counted(progress.planned, 'video')} done"]
    if progress.wait_share is not None:
        parts.append(f"networks wait {progress.wait_share:.0%}")
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    return ", ".join(parts)


def _states(status: LedgerStatus) -> dict[str, int]:
    counts = {"done": len(status.done), "failed": len(status.failed), "pending": len(status.pending)}
    return {"planned": sum(counts.values()), **counts}


def _all_shards_sentence(states: dict[str, int]) -> str:
    planned = counted(states["planned"], "video")
    return f"all shards: {states['done']} of {planned} done, {states['failed']} failed, {states['pending']} pending"


def _print_summary(summary: ExtractionSummary, config: PipelineConfig) -> None:
    for video, reason in list(summary.failed.items())[:_NAMED_FAILURES]:
        print_answer(f"failed {video}: {reason}")
    if len(summary.failed) > _NAMED_FAILURES:
        print_answer(f"... and {len(summary.failed) - _NAMED_FAILURES} more; the ledger in the cache names them all")
    now = f", {summary.extracted_now} of them now" if summary.extracted_now else ""
    print_answer(
        f"{summary.done} of {counted(summary.planned, 'video')} done{now}, {len(summary.failed)} failed, "
        f"{summary.pending} pending; cache {locations.cache_root(config)}"
    )
    if summary.remarks:
        lost = f"; planned frames lost with them: {summary.frames_lost}" if summary.frames_lost else ""
        print_answer(f"{damaged_sentence(summary.remarks)}{lost}")
    if summary.frames_now:
        print_answer(
            f"{counted(summary.frames_now, 'frame')} in {duration(summary.seconds)} = "
            f"{rate(summary.frames_now / summary.seconds, 'frame')}, the workers' start included; decoding "
            f"{duration(summary.decode_s)}, networks {duration(summary.networks_s)}, which waited "
            f"{summary.wait_share or 0.0:.0%} of their time"
        )
    if summary.failed:
        print_answer("try the failed ones again with --retry-failed; files that were missing are looked for each time")
