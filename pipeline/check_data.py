"""The doctor's checks of the data set and of its feature cache."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import locations
from pipeline.config import PipelineConfig
from pipeline.findings import Finding
from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import FILE_NAME
from stages.card_schema import Card
from stages.cards import differences_from_expected
from stages.errors import UserError
from stages.frame_plan import plan_frames
from stages.manifest import Manifest

# So many missing videos, failed videos or differing counts are named.
_NAMED = 5


def check_data(config: PipelineConfig) -> Iterator[Finding]:
    """Look for the files that the card names, and for every video of the configured task."""
    card = locations.card_of(config)
    annotations, videos = locations.annotations_folder(config), locations.videos_folder(config)
    yield Finding("data", "data set", "ok", f"{card.name}: {card.title}")
    found = list(_check_annotations(card, annotations))
    yield from found
    if not videos.is_dir():
        fix = _how_to_get(card, "video", videos)
        yield Finding("data", "videos", "missing", f"no folder {videos}", fix)
    if any(finding.status == "ok" for finding in found):
        manifest = locations.manifest_of(config, with_videos=videos.is_dir())
        yield _count_samples(config, card, manifest)
        if videos.is_dir():
            yield _check_videos(card, manifest, videos)


def _check_annotations(card: Card, folder: Path) -> Iterator[Finding]:
    files: dict[str, str] = {f"annotations {split}": name for split, name in card.annotations.files.items()}
    if card.annotations.file is not None:
        files["annotations"] = card.annotations.file
    fix = _how_to_get(card, "annotation", folder)
    if not folder.is_dir():
        yield Finding("data", "annotations", "missing", f"no folder {folder}", fix)
        return
    for item, name in files.items():
        if (folder / name).is_file():
            yield Finding("data", item, "ok", str(folder / name))
        else:
            yield Finding("data", item, "missing", f"no file {folder / name}", fix)


def _how_to_get(card: Card, kind: str, folder: Path) -> str:
    wanted = f"put the {kind} files into {folder}, or set data.{kind.removesuffix('s')}s to their folder"
    return f"{wanted}. {' '.join(card.download.split())}" if card.download else wanted


def _count_samples(config: PipelineConfig, card: Card, manifest: Manifest) -> Finding:
    """Compare the counts of the configured task with the published ones."""
    if config.data.task != "all":
        expected = {task: counts for task, counts in card.expected.items() if task == config.data.task}
        card = card.model_copy(update={"expected": expected})
    different = differences_from_expected(card, manifest)
    if different:
        fix = "get the published annotation files; with these, results cannot be compared with published ones"
        return Finding("data", "samples", "problem", _named(different, "; "), fix)
    counts = [f"{sum(sample.split == split for sample in manifest.samples)} {split}" for split in manifest.splits]
    return Finding("data", "samples", "ok", f"{', '.join(counts)} about {len(manifest.videos)} videos")


def _check_videos(card: Card, manifest: Manifest, folder: Path) -> Finding:
    local = {video.id: folder / video.path for video in manifest.videos.values() if "://" not in video.path}
    missing = [f"{name} ({path})" for name, path in local.items() if not path.is_file()]
    remote = len(manifest.videos) - len(local)
    elsewhere = f", {remote} more are addresses and not looked at" if remote else ""
    found = f"{len(local) - len(missing)} of {len(local)} are in {folder}{elsewhere}"
    if not missing:
        return Finding("data", "videos", "ok", found)
    fix = f"{_how_to_get(card, 'video', folder)} Without them, extraction counts these videos as failed."
    return Finding("data", "videos", "missing", f"{found}; missing {_named(missing)}", fix)


def check_cache(config: PipelineConfig) -> Iterator[Finding]:
    """Say whether the cache fits the configuration, which videos it has, and what to run next."""
    root, extract = locations.cache_root(config), locations.extract_command(config)
    # An HDF5 export is a file.
    if not root.is_file() and not (root / FILE_NAME).is_file():
        yield Finding("cache", "cache", "missing", f"none at {root}", f"run `{extract}`")
        return
    cache = FeatureCache.open(root)
    yield _check_fingerprint(config, cache)
    try:
        manifest = locations.manifest_of(config)
    except UserError:
        # The data section has said what is wrong; what is cached can be counted all the same.
        info = cache.info()
        detail = f"{info.num_videos} with {info.num_frames} frames; without annotations, nobody knows which are missing"
        yield Finding("cache", "videos", "ok", detail)
        return
    yield from _check_ledger(cache, manifest, extract)


def _check_fingerprint(config: PipelineConfig, cache: FeatureCache) -> Finding:
    # torch is behind this module; whoever has no cache yet need not wait for it.
    from stages.extraction import feature_fields

    try:
        cache.fingerprint.require_match(feature_fields(config, with_teacher=config.alignment.kd_weight > 0), cache.root)
    except UserError as error:
        fix = "set cache.root to another folder, or choose the preset that this cache was made with"
        return Finding("cache", "fingerprint", "problem", str(error), fix)
    return Finding("cache", "fingerprint", "ok", f"{cache.root} fits the configuration")


def _check_ledger(cache: FeatureCache, manifest: Manifest, extract: str) -> Iterator[Finding]:
    status = cache.ledger.status(plan_frames(manifest).times_s)
    planned = len(status.done) + len(status.failed) + len(status.pending)
    counts = f"{len(status.done)} of {planned} done, {len(status.failed)} failed, {len(status.pending)} pending"
    if status.damaged:
        damaged = [f"{video}: {reason}" for video, reason in sorted(status.damaged.items())]
        yield Finding("cache", "commits", "problem", f"damaged: {_named(damaged, '; ')}", f"run `{extract}` again")
    if status.pending:
        yield Finding("cache", "videos", "missing", counts, f"run `{extract}`")
        return
    if status.failed:
        reasons = [f"{video}: {failure.reason}" for video, failure in sorted(status.failed.items())]
        fix = f"run `{extract} --retry-failed` when the cause is mended; training leaves these videos out"
        yield Finding("cache", "videos", "problem", f"{counts}; {_named(reasons, '; ')}", fix)
    else:
        yield Finding("cache", "videos", "ok", counts)
    if status.done:
        yield Finding("cache", "next", "ok", f"pipeline train{extract.removeprefix('pipeline extract')}")


def _named(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more
