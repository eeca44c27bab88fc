"""Looking after a cache: check its bytes, count them, put damaged videos back into the queue, remove leftovers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from stages.cache.files.errors import DamagedCacheError
from stages.cache.files.files import Files
from stages.cache.ledger import Ledger
from stages.cache.stores.commit import (
    COMMITS,
    VIDEOS,
    CommitRecord,
    committed_ids,
    load_record,
    load_records,
    record_name,
)
from stages.cache.stores.stores import Store
from stages.cache.stores.survey import STALE_AFTER_S, is_left_behind, orphan_groups
from stages.cache.stores.writing import TMP


@dataclass(frozen=True)
class CheckResult:
    """What `verify` found for a video, or for an orphan: what no commit record names (`video` is whose it was).

    `remark` is what the commit record has of damage of the video's file, which is no fault of the cache.
    """

    video: str
    problems: tuple[str, ...]
    orphan: bool = False
    remark: str | None = None

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class SweepReport:
    """What `sweep` removed, or would remove: paths relative to the cache, and the bytes of their files."""

    removed: tuple[str, ...]
    freed_bytes: int


@dataclass(frozen=True)
class CacheInfo:
    """Counts over the valid commit records.

    `kind` is zarr, webdataset or hdf5; `num_bytes` are those of the arrays, `stored_bytes` those of their files,
    padding included; `damaged` are the ids whose commit record is broken; `remarks`, by id, name damage
    of videos' files.
    """

    kind: str
    num_videos: int
    num_frames: int
    num_bytes: int
    stored_bytes: int
    num_orphans: int
    damaged: tuple[str, ...]
    remarks: dict[str, str]


def verify(store: Store, fingerprint: str, video: str) -> CheckResult:
    """Read all of a video's bytes and compare them with its commit record; every fault is one of the `problems`."""
    try:
        record = load_record(store, video)
        if record is None:
            return CheckResult(video, ("there is no commit record",))
        problems = store.problems(record)
    except DamagedCacheError as error:
        return CheckResult(video, (error.fault,))
    if record.fingerprint != fingerprint:
        problems.insert(0, "it was committed with another fingerprint than this cache has")
    return CheckResult(video, tuple(problems), remark=record.remark)


def verify_all(store: Store, fingerprint: str) -> Iterator[CheckResult]:
    """Yield the result of `verify` for each committed video, then one for each missing video and each orphan.

    Missing is a video that the ledger lists as done and nobody has put back into the queue since.

    Raises:
        UserError: a broken ledger line.
    """
    # In this order, so that a video that is being committed meanwhile is not missing.
    log = Ledger(store, fingerprint).read()
    committed = committed_ids(store)
    for video in committed:
        yield verify(store, fingerprint, video)
    for video in sorted(set(log.done) - set(committed)):
        yield CheckResult(video, ("the ledger lists it as done, but nothing is committed",))
    for what, why in store.orphans():
        yield CheckResult(what, (why,), orphan=True)


def info(store: Store, on_video: Callable[[], None] = lambda: None) -> CacheInfo:
    """Count videos, frames and bytes from the commit records; `on_video` is called after each one."""
    records: list[CommitRecord] = []
    damaged = []
    for video, record in load_records(store, committed_ids(store)):
        if isinstance(record, CommitRecord):
            records.append(record)
        elif record is not None:
            damaged.append(video)
        on_video()
    return CacheInfo(
        kind=store.kind,
        num_videos=len(records),
        num_frames=sum(len(record.times_s) for record in records),
        num_bytes=sum(record.num_bytes for record in records),
        stored_bytes=store.stored_bytes(records),
        num_orphans=len(store.orphans()),
        damaged=tuple(damaged),
        remarks={record.video: record.remark for record in records if record.remark is not None},
    )


def requeue(store: Store, fingerprint: str, videos: Iterable[str]) -> tuple[str, ...]:
    """Put those `videos` that are damaged or missing back into the queue, by the ledger; returns their ids.

    What is left of their commit records is removed, and the next extraction writes them again. Each is checked once
    more, because it may have been replaced meanwhile.

    Raises:
        UserError: an export, another process writes into the cache, or the disk refuses.
    """
    files, removed = store.require_writable(), []
    with Ledger(store, fingerprint).writer() as ledger:
        for video in videos:
            found = verify(store, fingerprint, video)
            if not found.ok:
                files.remove(f"{COMMITS}/{record_name(files.root, video)}")
                ledger.requeued(video, reason=found.problems[0])
                removed.append(video)
    return tuple(removed)


def remove_videos(
    store: Store, fingerprint: str, videos: Iterable[str], *, reason: str, dry_run: bool = False
) -> SweepReport:
    """Remove committed videos, the record first, and log it in the ledger with the `reason`.

    Raises:
        UserError: an export, another process writes into the cache, or the disk refuses.
    """
    files = store.require_writable()
    removed, freed = [], 0
    with nullcontext() if dry_run else Ledger(store, fingerprint).writer() as ledger:
        for video in videos:
            removed.append(f"{COMMITS}/{record_name(files.root, video)}")
            freed += remove_video(files, video, dry_run=dry_run)
            if ledger is not None:
                ledger.requeued(video, reason=reason)
    return SweepReport(tuple(removed), freed)


def remove_video(files: Files, video: str, *, dry_run: bool = False) -> int:
    """Remove a video's commit record, then its frames; returns the bytes of these."""
    try:
        record = load_record(files, video)
    except DamagedCacheError:
        record = None  # which groups were its own, the sweep finds out
    if not dry_run:
        files.remove(f"{COMMITS}/{record_name(files.root, video)}")
        if record is not None:
            files.remove_tree(f"{VIDEOS}/{record.group}")
    return 0 if record is None else record.stored_bytes


def sweep(files: Files, stale_after_s: float = STALE_AFTER_S, *, dry_run: bool = False) -> SweepReport:
    """Remove temporary folders that nobody writes any more, and groups that no commit record names.

    A temporary folder is left behind if its writer ran on this host and is known to be dead, or if nothing in it
    changed for `stale_after_s` seconds, whoever wrote it. A writer on another host is therefore trusted for a day.
    A group is an orphan if no commit record names it and no live temporary folder holds a record about to name it.
    Groups of a video whose commit record is damaged stay: they may be all that is left of it.
    """
    orphans = [f"{VIDEOS}/{group}" for group in orphan_groups(files, stale_after_s)]
    attempts = [f"{TMP}/{name}" for name in files.names(TMP)]
    leftovers = orphans + [attempt for attempt in attempts if is_left_behind(files, attempt, stale_after_s)]
    sizes = {path: files.tree_bytes(path) for path in leftovers}
    gone = [path for path in leftovers if dry_run or files.remove_tree(path)]
    return SweepReport(tuple(gone), sum(sizes[path] for path in gone))
