"""`pipeline cache info` and `pipeline cache verify`."""

from dataclasses import asdict
from pathlib import Path

from pipeline.console import emit_json, progress_bar, say
from stages.cache.feature_cache import FeatureCache


def info(root: Path, *, as_json: bool) -> None:
    """Print what the cache holds and which fingerprint it has."""
    cache = FeatureCache.open(root)
    found = cache.info()
    if as_json:
        emit_json({**asdict(found), "fingerprint": cache.fingerprint.fields, "digest": cache.fingerprint.digest})
        return
    say(f"{found.num_videos} videos, {found.num_frames} frames, {found.stored_bytes / 1e9:.3f} GB in {root}")
    for name, value in cache.fingerprint.fields.items():
        say(f"  {name} = {value}")
    if found.damaged or found.num_orphans:
        say(f"{len(found.damaged)} damaged records, {found.num_orphans} orphans; `pipeline cache verify` names them")


def verify(root: Path, *, as_json: bool) -> bool:
    """Check every stored byte against its checksum; returns whether all is well."""
    cache = FeatureCache.open(root)
    bad = []
    with progress_bar("verify", len(cache.video_ids()), "videos") as bar:
        for result in cache.verify_all():
            if not result.orphan:
                bar.advance()
            if not result.ok:
                bad.append(result)
    if as_json:
        emit_json([asdict(result) for result in bad])
    for result in bad:
        kind = "orphan of" if result.orphan else "video"
        say(f"{kind} {result.video}: {'; '.join(result.problems)}")
    say("every video is whole" if not bad else f"{len(bad)} problems; extracting again writes damaged videos anew")
    return not bad
