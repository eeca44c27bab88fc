"""What is in a cache's directory besides committed videos: groups that no record names, attempts nobody finishes."""

import json

from stages.cache.files.errors import DamagedCacheError
from stages.cache.files.files import Files
from stages.cache.files.writers import Writer
from stages.cache.stores.commit import VIDEOS, committed_ids, load_records
from stages.cache.stores.writing import PENDING_RECORD, TMP

STALE_AFTER_S = 24 * 3600.0
"""Age after which a temporary folder counts as left behind even if its writer cannot be asked."""


def orphan_groups(files: Files, stale_after_s: float = STALE_AFTER_S) -> list[str]:
    """The groups that neither a record nor a live attempt names; those of videos with damaged records are left out."""
    # The order matters: a live attempt holds its pending record until the commit record names the group, so a group
    # that is listed first and found in neither afterwards is not about to be committed.
    groups = files.names(VIDEOS)
    attempts = [f"{TMP}/{name}" for name in files.names(TMP)]
    live = [attempt for attempt in attempts if not is_left_behind(files, attempt, stale_after_s)]
    needed = {_pending_group(files, attempt) for attempt in live}
    damaged = set()
    for video, record in load_records(files, committed_ids(files)):
        if isinstance(record, DamagedCacheError):
            damaged.add(video)
        elif record is not None:
            needed.add(record.group)
    return sorted(group for group in groups if group not in needed and video_of(group) not in damaged)


def is_left_behind(files: Files, attempt: str, stale_after_s: float) -> bool:
    """Whether nobody writes into a temporary folder any more."""
    writer = Writer.of(attempt.rpartition("/")[2])
    if writer is not None and writer.is_known_dead():
        return True
    return files.idle_s(attempt) > stale_after_s


def video_of(group: str) -> str:
    """The video in a group's name."""
    return group.rpartition(".")[0]


def _pending_group(files: Files, attempt: str) -> str | None:
    try:
        return str(json.loads(files.content(attempt, PENDING_RECORD) or b"")["group"])
    except (ValueError, KeyError, TypeError):
        return None  # no record there yet, or not whole: then its group has not been moved yet
