"""`pipeline extract`: Stage 1."""

from dataclasses import asdict

from pipeline import locations
from pipeline.config import PipelineConfig, Resolved
from pipeline.console import emit_json, progress_bar, say
from stages.cache.feature_cache import FeatureCache
from stages.extraction import Extraction, ExtractionSummary, fingerprint, settle_precision
from stages.frame_plan import plan_frames
from stages.worker import ExtractionJob, VideoOutcome

# So many failed videos are named in the summary; the ledger has them all.
_NAMED_FAILURES = 10


def run(resolved: Resolved, *, address: str | None, retry_failed: bool, as_json: bool) -> bool:
    """Extract, print the summary, and say whether any planned video has failed."""
    config = resolved.config
    extraction = _prepare(config, retry_failed=retry_failed)
    summary = _run(extraction, address)
    if as_json:
        emit_json({**asdict(summary), "cache": str(locations.cache_root(config))})
    _say_summary(summary, config)
    return bool(summary.failed)


def _prepare(config: PipelineConfig, *, retry_failed: bool) -> Extraction:
    manifest = locations.manifest_of(config, with_videos=True)
    plan = plan_frames(manifest)
    root = locations.cache_root(config)
    extract = settle_precision(config.extract)
    identity = fingerprint(config, extract, lambda report: say(report.summary()))
    cache = FeatureCache.create_or_open(root, identity, extract_command=locations.extract_command(config))
    job = ExtractionJob(config.encoder, config.teacher, extract, str(root.resolve()))
    videos = locations.videos_folder(config).resolve()
    return Extraction(manifest, plan, cache, job, videos=videos, retry_failed=retry_failed)


def _run(extraction: Extraction, address: str | None) -> ExtractionSummary:
    if not extraction.todo:
        return extraction.run(lambda _tasks: iter(()), lambda _outcome: None)
    say(f"extracting {len(extraction.todo)} of {extraction.plan.num_videos} videos; starting Ray and the networks")
    # Ray takes seconds to import; a finished extraction never gets here.
    from stages.ray_flow import cluster, process_all

    frames, failed = 0, 0
    planned, left = extraction.plan.num_videos, len(extraction.todo)
    with progress_bar("extract", planned, "videos", done=planned - left) as bar, cluster(address):

        def on_outcome(outcome: VideoOutcome) -> None:
            nonlocal frames, failed
            frames += outcome.frames
            failed += outcome.reason is not None
            bar.advance(note=f"{frames} frames" + (f", {failed} failed" if failed else ""))

        return extraction.run(lambda tasks: process_all(tasks, extraction.job), on_outcome)


def _say_summary(summary: ExtractionSummary, config: PipelineConfig) -> None:
    for video, reason in list(summary.failed.items())[:_NAMED_FAILURES]:
        say(f"failed {video}: {reason}")
    if len(summary.failed) > _NAMED_FAILURES:
        say(f"... and {len(summary.failed) - _NAMED_FAILURES} more; the ledger in the cache names them all")
    now = f", {summary.extracted_now} of them now ({summary.frames_now} frames)" if summary.extracted_now else ""
    say(
        f"{summary.done} of {summary.planned} videos done{now}, {len(summary.failed)} failed, "
        f"{summary.pending} pending; cache {locations.cache_root(config)}"
    )
    if summary.failed:
        say("try the failed ones again with --retry-failed")
