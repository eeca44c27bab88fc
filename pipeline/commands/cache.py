"""`pipeline cache info`, `verify`, `convert` and `prune`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.console import emit_json, progress_bar, say
from stages.cache.feature_cache import FeatureCache
from stages.cache.maintenance import CheckResult
from stages.cache.stores import ZARR

# So many removed folders are named; --json names them all.
_NAMED = 20


def info(root: Path, *, as_json: bool) -> None:
    """Print what the cache holds and which fingerprint it has."""
    cache = FeatureCache.open(root)
    found = cache.info()
    if as_json:
        emit_json({**asdict(found), "fingerprint": cache.fingerprint.fields, "digest": cache.fingerprint.digest})
        return
    size = f"{found.stored_bytes / 1e9:.3f} GB ({found.kind})"
    say(f"{found.num_videos} videos, {found.num_frames} frames, {size} in {root}")
    for name, value in cache.fingerprint.fields.items():
        say(f"  {name} = {value}")
    if found.damaged or found.num_orphans:
        say(f"{len(found.damaged)} damaged records, {found.num_orphans} orphans; `pipeline cache verify` names them")


def verify(root: Path, *, repair: bool, as_json: bool) -> bool:
    """Check every stored byte against its checksum; returns whether all is well, or mended.

    Args:
        repair: put damaged videos back into the queue and remove what belongs to no video.
    """
    cache = FeatureCache.open(root)
    if repair:
        cache.store.require_writable()
    bad = _check(cache)
    for result in bad:
        say(f"{'orphan' if result.orphan else 'video'} {result.video}: {'; '.join(result.problems)}")
    if not repair:
        if as_json:
            emit_json([asdict(result) for result in bad])
        say("every video is whole" if not bad else f"{len(bad)} problems; {_advice(cache)}")
        return not bad
    return _repair(cache, bad, as_json=as_json)


def _check(cache: FeatureCache) -> list[CheckResult]:
    bad = []
    with progress_bar("verify", len(cache.video_ids()), "videos") as bar:
        for result in cache.verify_all():
            if not result.orphan:
                bar.advance()
            if not result.ok:
                bad.append(result)
    return bad


def _advice(cache: FeatureCache) -> str:
    if cache.store.kind != ZARR:
        return "export the cache anew"
    return f"`pipeline cache verify {cache.root} --repair` removes what is damaged and queues it again"


def _repair(cache: FeatureCache, bad: list[CheckResult], *, as_json: bool) -> bool:
    broken = [result.video for result in bad if not result.orphan]
    committed = set(cache.video_ids())
    missing = [video for video in broken if video not in committed]
    requeued = cache.requeue([video for video in broken if video in committed])
    swept = cache.sweep()
    again = sorted([*requeued, *missing])
    if as_json:
        emit_json({"problems": [asdict(result) for result in bad], "requeued": again, **asdict(swept)})
    say(f"{len(requeued)} damaged videos and {len(swept.removed)} leftovers removed")
    if again:
        say(f"run `{cache.extract_command}`: it extracts {len(again)} videos anew")
    return True


def convert(source: Path, target: Path, kind: str, *, shard_gb: float, as_json: bool) -> None:
    """Write a cache or an export as another kind of store."""
    from stages.cache.convert import convert as work

    cache = FeatureCache.open(source)
    with progress_bar("convert", len(cache.video_ids()), "videos") as bar:
        done = work(cache, target, kind, shard_bytes=int(shard_gb * 1e9), on_video=bar.advance)
    if as_json:
        emit_json({**asdict(done), "target": str(target)})
    say(f"{done.num_videos} videos, {done.num_frames} frames, {done.num_bytes / 1e9:.3f} GB as {done.kind} in {target}")


def prune(root: Path, *, dry_run: bool, as_json: bool) -> None:
    """Remove what belongs to no committed video and what nobody writes any more, or say what that would be."""
    swept = FeatureCache.open(root).sweep(dry_run=dry_run)
    for path in swept.removed[:_NAMED]:
        say(path)
    if len(swept.removed) > _NAMED:
        say(f"... and {len(swept.removed) - _NAMED} more")
    report: dict[str, Any] = {**asdict(swept), "dry_run": dry_run}
    if as_json:
        emit_json(report)
    freed = f"{len(swept.removed)} leftovers, {swept.freed_bytes / 1e9:.3f} GB"
    say(f"{freed} would be removed; run it without --dry-run" if dry_run else f"{freed} removed")
