"""Looking after a cache: check its bytes, count them, remove what killed or overtaken writers left behind."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.cache.commit import VIDEOS, CommitRecord, committed_ids, load_record, load_records, names_in
from stages.cache.errors import DamagedCacheError
from stages.cache.writers import Writer
from stages.cache.writing import PENDING_RECORD, TMP
from stages.cache.zarr_store import group_problems

STALE_AFTER_S = 24 * 3600.0
"""Age after which a temporary folder counts as left behind even if its writer cannot be asked."""


@dataclass(frozen=True)
class CheckResult:
    """What `verify` found for a video, or for an orphan (a group that no record names; `video` is whose it was)."""

    video: str
    problems: tuple[str, ...]
    orphan: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class SweepReport:
    """What `sweep` removed, as paths relative to the cache."""

    removed: tuple[str, ...]


@dataclass(frozen=True)
class CacheInfo:
    """Counts over the valid commit records.

    `num_bytes` are those of the arrays, `stored_bytes` those of their files, padding included; `damaged` are the ids
    whose commit record is broken.
    """

    num_videos: int
    num_frames: int
    num_bytes: int
    stored_bytes: int
    num_orphans: int
    damaged: tuple[str, ...]


def verify(root: Path, fingerprint: str, video: str) -> CheckResult:
    """Read all of a video's bytes and compare them with its commit record; every fault is one of the `problems`.

    Args:
        fingerprint: digest of the cache's fingerprint.
    """
    try:
        record = load_record(root, video)
    except DamagedCacheError as error:
        return CheckResult(video, (str(error),))
    if record is None:
        return CheckResult(video, ("there is no commit record",))
    problems = group_problems(root / VIDEOS / record.group, record)
    if record.fingerprint != fingerprint:
        problems.insert(0, "it was committed with another fingerprint than this cache has")
    return CheckResult(video, tuple(problems))


def verify_all(root: Path, fingerprint: str) -> Iterator[CheckResult]:
    """Yield the result of `verify` for each committed video, then one for each orphan."""
    for video in committed_ids(root):
        yield verify(root, fingerprint, video)
    for group in _survey(root, STALE_AFTER_S).orphans:
        yield CheckResult(_video_of(group), (f"no commit record names the group {group}",), orphan=True)


def info(root: Path) -> CacheInfo:
    """Count videos, frames and bytes from the commit records alone."""
    survey = _survey(root, STALE_AFTER_S)
    return CacheInfo(
        num_videos=len(survey.records),
        num_frames=sum(len(record.times_s) for record in survey.records),
        num_bytes=sum(record.num_bytes for record in survey.records),
        stored_bytes=sum(record.stored_bytes for record in survey.records),
        num_orphans=len(survey.orphans),
        damaged=survey.damaged,
    )


def sweep(root: Path, stale_after_s: float = STALE_AFTER_S) -> SweepReport:
    """Remove temporary folders that nobody writes any more, and groups that no commit record names.

    A temporary folder is left behind if its writer ran on this host and is known to be dead, or if nothing in it
    changed for `stale_after_s` seconds, whoever wrote it. A writer on another host is therefore trusted for a day.
    A group is an orphan if no commit record names it and no live temporary folder holds a record about to name it.
    Groups of a video whose commit record is damaged stay: they may be all that is left of it.
    """
    orphans = [root / VIDEOS / group for group in _survey(root, stale_after_s).orphans]
    attempts = [root / TMP / name for name in names_in(root / TMP)]
    removed = orphans + [attempt for attempt in attempts if _is_left_behind(attempt, stale_after_s)]
    for path in removed:
        # Another sweep or the writer itself may be removing it too.
        shutil.rmtree(path, ignore_errors=True)
    return SweepReport(tuple(str(path.relative_to(root)) for path in removed if not path.exists()))


@dataclass(frozen=True)
class _Survey:
    records: list[CommitRecord]
    damaged: tuple[str, ...]
    orphans: list[str]


def _survey(root: Path, stale_after_s: float) -> _Survey:
    """Read all commit records and find the groups that neither one of them nor a live attempt names."""
    # The order matters: a live attempt holds its pending record until the commit record names the group, so a group
    # that is listed first and found in neither afterwards is not about to be committed.
    groups = names_in(root / VIDEOS)
    attempts = [root / TMP / name for name in names_in(root / TMP)]
    needed = {_pending_group(attempt) for attempt in attempts if not _is_left_behind(attempt, stale_after_s)}
    records, damaged = [], set()
    for video, record in load_records(root, committed_ids(root)):
        if isinstance(record, DamagedCacheError):
            damaged.add(video)
        elif record is not None:
            records.append(record)
    needed.update(record.group for record in records)
    orphans = sorted(group for group in groups if group not in needed and _video_of(group) not in damaged)
    return _Survey(records, tuple(sorted(damaged)), orphans)


def _pending_group(attempt: Path) -> str | None:
    try:
        return str(json.loads((attempt / PENDING_RECORD).read_bytes())["group"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no record there yet, or not whole: then its group has not been moved yet


def _is_left_behind(attempt: Path, stale_after_s: float) -> bool:
    writer = Writer.of(attempt.name)
    if writer is not None and writer.is_known_dead():
        return True
    changes = []
    for path in [attempt, *attempt.rglob("*")]:
        try:
            changes.append(path.stat().st_mtime)
        except FileNotFoundError:
            continue  # moved into place meanwhile
    return not changes or time.time() - max(changes) > stale_after_s


def _video_of(group: str) -> str:
    return group.rpartition(".")[0]
