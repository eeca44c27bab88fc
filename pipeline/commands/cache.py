"""`pipeline cache info`, `verify`, `convert` and `prune`."""

from collections.abc import Iterator
from dataclasses import asdict

from pipeline.screen.console import beside_json, emit_json, print_answer, progress_bar
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.cache.feature_cache import FeatureCache
from stages.cache.files.places import place_of
from stages.cache.maintenance import CheckResult, SweepReport
from stages.cache.source import damaged_sentence, find_changes, outdated_sentence
from stages.cache.stores.commit import CommitRecord, load_records
from stages.cache.stores.stores import ZARR
from stages.config import ExtractConfig
from stages.data.video_paths import join_video_path, videos_root
from stages.errors import UserError
from stages.wording import counted, first_names

# So many removed folders are named; --json names them all.
_NAMED = 20


def info(root: str, *, as_json: bool) -> None:
    """Print what the cache holds and which fingerprint it has."""
    cache = FeatureCache.open(root)
    with progress_bar("read", len(cache.video_ids()), "video") as bar:
        found = cache.info(bar.advance)
    if as_json:
        emit_json({**asdict(found), "fingerprint": cache.fingerprint.fields, "digest": cache.fingerprint.digest})
        return
    size = f"{found.stored_bytes / 1e9:.3f} GB ({found.kind})"
    print_answer(f"{_contents(found.num_videos, found.num_frames)}, {size} in {cache.root}")
    for name, value in cache.fingerprint.fields.items():
        print_answer(f"  {name} = {value}")
    if found.remarks:
        print_answer(damaged_sentence(found.remarks))
    if found.damaged or found.num_orphans:
        bad = f"{counted(len(found.damaged), 'damaged record')}, {counted(found.num_orphans, 'orphan')}"
        print_answer(f"{bad}; `pipeline cache verify` names them")


def _contents(videos: int, frames: int) -> str:
    return f"{counted(videos, 'video')}, {counted(frames, 'frame')}"


def verify(root: str, *, repair: bool, as_json: bool, videos: str | None = None) -> bool:
    """Check every stored byte against its checksum; returns whether all is well, or mended.

    Args:
        videos: folder or URL of the video files, to compare with those that the cached frames are from.
    """
    cache = FeatureCache.open(root)
    if repair:
        cache.store.require_writable()
    with beside_json(as_json):
        changed = [] if videos is None else _changed_files(cache, videos)
        bad, remarks = _check(cache)
        if remarks:
            print_answer(damaged_sentence(remarks))
    # An export has nothing left over: whatever is no video of it is a part of its files.
    stray = "orphan" if cache.store.kind == ZARR else "part"
    with beside_json(as_json):
        for result in bad:
            print_answer(f"{stray if result.orphan else 'video'} {result.video}: {'; '.join(result.problems)}")
        if repair:
            return _repair(cache, bad, as_json=as_json) and not changed
        print_answer("every video is whole" if not bad else f"{counted(len(bad), 'problem')}; {_advice(cache)}")
    if as_json:
        emit_json([asdict(result) for result in (*changed, *bad)])
    return not bad and not changed


def _changed_files(cache: FeatureCache, videos: str) -> list[CheckResult]:
    """The videos whose files have changed, by content where that is recorded; those that may have are only named."""
    folder = videos_root(videos)
    found = load_records(cache.store, cache.video_ids())
    # What is wrong with a broken record is found by the check of the bytes.
    records = [record for _, record in found if isinstance(record, CommitRecord)]
    recorded = {record.video: record.source for record in records if record.source is not None}
    protocols = (*ExtractConfig().protocols, "file")

    def place_of(video: str) -> str:
        return join_video_path(folder, recorded[video].path, protocols, video=video)

    with progress_bar("compare", len(recorded), "file") as bar:
        changes = find_changes(recorded, place_of, digests="all", on_video=bar.advance)
    absent = f"; not there: {len(changes.absent)} ({first_names(changes.absent)})" if changes.absent else ""
    print_answer(f"video files compared with those that the cached frames are from: {changes.compared}{absent}")
    if unknown := len(records) - len(recorded):
        print_answer(f"videos whose file the cache does not know, because an earlier version extracted them: {unknown}")
    if changes.outdated:
        print_answer(f"{outdated_sentence(changes)}; `pipeline extract --refresh-changed` extracts these again")
    return [
        CheckResult(video, (f"its file has changed since its extraction: {difference}",))
        for video, difference in changes.changed.items()
    ]


def _check(cache: FeatureCache) -> tuple[list[CheckResult], dict[str, str]]:
    """What is wrong, and what is known of damage of video files, by id."""
    bad, remarks, videos = [], {}, set(cache.video_ids())
    with progress_bar("verify", len(videos), "video") as bar:
        for result in cache.verify_all():
            # Not of videos that only the ledger knows, nor of one committed meanwhile.
            if not result.orphan and result.video in videos:
                bar.advance()
            if result.remark is not None:
                remarks[result.video] = result.remark
            if not result.ok:
                bad.append(result)
    return bad, remarks


def _advice(cache: FeatureCache) -> str:
    if cache.store.kind != ZARR:
        return "export the cache again"
    return f"`pipeline cache verify {cache.root} --repair` removes what is damaged and queues it again"


def _repair(cache: FeatureCache, bad: list[CheckResult], *, as_json: bool) -> bool:
    broken = [result.video for result in bad if not result.orphan]
    committed = set(cache.video_ids())
    # The missing ones, too: the ledger must not list them as done any more.
    requeued = sorted(cache.requeue(broken))
    swept = cache.sweep()
    if as_json:
        emit_json({"problems": [asdict(result) for result in bad], "requeued": requeued, **asdict(swept)})
    removed = committed.intersection(requeued)
    damaged, leftovers = counted(len(removed), "damaged video"), counted(len(swept.removed), "leftover")
    print_answer(f"{damaged} and {leftovers} removed")
    if requeued:
        print_answer(f"run `{cache.extract_command}`: it extracts {counted(len(requeued), 'video')} again")
    return True


def convert(source: str, target: str, kind: str, *, shard_gb: float, as_json: bool) -> None:
    """Write a cache or an export as another kind of store."""
    from stages.cache.convert import convert as work

    cache, place = FeatureCache.open(source), place_of(target)
    with progress_bar("convert", len(cache.video_ids()), "video") as bar:
        done = work(cache, place, kind, shard_bytes=int(shard_gb * 1e9), on_video=bar.advance)
    if as_json:
        emit_json({**asdict(done), "target": str(place)})
    with beside_json(as_json):
        stored = f"{done.num_bytes / 1e9:.3f} GB as {done.kind} in {place}"
        print_answer(f"{_contents(done.num_videos, done.num_frames)}, {stored}")


def prune(root: str, *, dry_run: bool, as_json: bool, keep: PipelineConfig | None = None, yes: bool = False) -> None:
    """Remove what belongs to no committed video and what nobody writes any more, or print what that would be.

    Args:
        keep: data set and task; committed videos that no sample of them is about are removed, too.
        yes: whether that is meant.

    Raises:
        UserError: committed videos would be removed without `yes`.
    """
    cache = FeatureCache.open(root)
    cache.store.require_writable()
    reports = [] if keep is None else [_remove_unnamed(cache, keep, dry_run=dry_run, yes=yes)]
    reports.append(cache.sweep(dry_run=dry_run))
    removed = [path for report in reports for path in report.removed]
    freed_bytes = sum(report.freed_bytes for report in reports)
    if as_json:
        emit_json({"removed": removed, "freed_bytes": freed_bytes, "dry_run": dry_run})
    leftovers = len(reports[-1].removed)
    videos = f"{counted(len(removed) - leftovers, 'video')} and " if keep is not None else ""
    freed = f"{videos}{counted(leftovers, 'leftover')}, {freed_bytes / 1e9:.3f} GB"
    with beside_json(as_json):
        for path in removed[:_NAMED]:
            print_answer(path)
        if len(removed) > _NAMED:
            print_answer(f"... and {len(removed) - _NAMED} more")
        print_answer(f"{freed} would be removed; run it without --dry-run" if dry_run else f"{freed} removed")


def _remove_unnamed(cache: FeatureCache, keep: PipelineConfig, *, dry_run: bool, yes: bool) -> SweepReport:
    """Remove the committed videos that no sample of a data set is about."""
    manifest = locations.manifest_of(keep)
    if manifest.absent_splits:
        split, file = next(iter(manifest.absent_splits.items()))
        raise UserError(
            f"the annotations of split {split} are missing, so nobody knows which videos it names",
            where=file,
            hint="put them there first",
        )
    named = {sample.video for sample in manifest.samples} | set(manifest.left_out)
    unnamed = [video for video in cache.video_ids() if video not in named]
    if unnamed and not dry_run and not yes:
        raise UserError(
            f"{counted(len(unnamed), 'committed video')} would be removed, the first is {unnamed[0]!r}",
            where=cache.root,
            hint="look at them with --dry-run, and add --yes to remove them",
        )
    task = "" if keep.data.task == "all" else f" with task {keep.data.task}"
    with progress_bar("prune", len(unnamed), "video") as bar:

        def videos() -> Iterator[str]:
            for video in unnamed:
                yield video
                bar.advance()

        reason = f"pruned: {manifest.dataset}{task} does not name it"
        return cache.remove_videos(videos(), reason=reason, dry_run=dry_run)
