"""The one way into a cache: write aside, sync, rename, and only then replace the commit record.

    <root>/tmp/<token>.<pid>.<start>.<host>/group        while it is written
                                           /record.json  the record to be, until it is moved into place

An attempt has a folder of its own, so writers never meet in one. Kill it at any moment: the record is the old one or
the new one, and what is left over is found by `maintenance.sweep`, through the writer that the folder's name tells of.
"""

import secrets
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stages.atomic import sync_directory, sync_file
from stages.cache.commit import VIDEOS, CommitRecord, Directory, content_checksum, load_record, record_path
from stages.cache.errors import DamagedCacheError, storage_errors
from stages.cache.writers import current_writer
from stages.cache.zarr_store import write_group

TMP = "tmp"
PENDING_RECORD = "record.json"


def commit_video(root: Path, video: str, fingerprint: str, arrays: Mapping[str, np.ndarray]) -> CommitRecord:
    """Commit checked `arrays` (with `times_s` [T] float64 among them) as the new revision of `video`.

    If two writers race on one video, the record written last wins; the other's group is an orphan that `sweep` removes.

    Args:
        fingerprint: digest of the cache's fingerprint.

    Raises:
        UserError: the disk is full, read-only or forbidden; the old revision is then still in place.
    """
    target = record_path(root, video)
    attempt = root / TMP / f"{secrets.token_hex(4)}.{current_writer()}"
    needed_bytes = sum(array.nbytes for array in arrays.values())
    try:
        with storage_errors(root, needed_bytes):
            for folder in (attempt, root / VIDEOS, target.parent):
                folder.mkdir(parents=True, exist_ok=True)
            record = _write_aside(attempt, video, fingerprint, arrays)
            (attempt / "group").rename(root / VIDEOS / record.group)
            sync_directory(root / VIDEOS)
            previous = _previous_group(root, video)
            (attempt / PENDING_RECORD).replace(target)
            sync_directory(target.parent)
    finally:
        # Also after a failure; what cannot be removed now stays recognisable as this writer's and is swept later.
        shutil.rmtree(attempt, ignore_errors=True)
    if previous is not None:
        # A reader that still holds the old record finds the group gone and asks for the record again.
        shutil.rmtree(root / VIDEOS / previous, ignore_errors=True)
    return record


def _write_aside(attempt: Path, video: str, fingerprint: str, arrays: Mapping[str, np.ndarray]) -> CommitRecord:
    written = write_group(attempt / "group", arrays)
    times_s = arrays["times_s"]
    record = CommitRecord(
        format_version=1,
        video=video,
        group=f"{video}.{secrets.token_hex(4)}",
        fingerprint=fingerprint,
        arrays=written,
        checksum=content_checksum(video, fingerprint, times_s, written),
        committed=datetime.now(UTC),
        times_s=tuple(times_s.tolist()),
    )
    pending = attempt / PENDING_RECORD
    pending.write_text(record.model_dump_json() + "\n", encoding="utf-8")
    sync_file(pending)
    return record


def _previous_group(root: Path, video: str) -> str | None:
    try:
        previous = load_record(Directory(root), video)
    except DamagedCacheError:
        return None  # it is about to be replaced; the sweep finds its group
    return previous.group if previous else None
