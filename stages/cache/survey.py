"""What lies in a cache's directory besides committed videos: groups that no record names, attempts nobody finishes."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from stages.cache.commit import VIDEOS, CommitRecord, Directory, committed_ids, load_records, names_in
from stages.cache.errors import DamagedCacheError
from stages.cache.writers import Writer
from stages.cache.writing import PENDING_RECORD, TMP

STALE_AFTER_S = 24 * 3600.0
"""Age after which a temporary folder counts as left behind even if its writer cannot be asked."""


@dataclass(frozen=True)
class Survey:
    """Valid commit records, videos whose record is damaged, groups that no record and no live attempt names."""

    records: list[CommitRecord]
    damaged: tuple[str, ...]
    orphans: list[str]


def survey(root: Path, stale_after_s: float = STALE_AFTER_S) -> Survey:
    """Read all commit records and find the groups that neither one of them nor a live attempt names."""
    # The order matters: a live attempt holds its pending record until the commit record names the group, so a group
    # that is listed first and found in neither afterwards is not about to be committed.
    groups = names_in(root / VIDEOS)
    attempts = [root / TMP / name for name in names_in(root / TMP)]
    needed = {_pending_group(attempt) for attempt in attempts if not is_left_behind(attempt, stale_after_s)}
    records, damaged = [], set()
    files = Directory(root)
    for video, record in load_records(files, committed_ids(files)):
        if isinstance(record, DamagedCacheError):
            damaged.add(video)
        elif record is not None:
            records.append(record)
    needed.update(record.group for record in records)
    orphans = sorted(group for group in groups if group not in needed and video_of(group) not in damaged)
    return Survey(records, tuple(sorted(damaged)), orphans)


def is_left_behind(attempt: Path, stale_after_s: float) -> bool:
    """Whether nobody writes into a temporary folder any more."""
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


def video_of(group: str) -> str:
    """The video that a group's name tells of."""
    return group.rpartition(".")[0]


def _pending_group(attempt: Path) -> str | None:
    try:
        return str(json.loads((attempt / PENDING_RECORD).read_bytes())["group"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no record there yet, or not whole: then its group has not been moved yet
