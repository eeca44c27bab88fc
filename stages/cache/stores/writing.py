"""The one way into a cache: write aside, sync, rename, and only then replace the commit record.

    <root>/tmp/<token>.<pid>.<start>.<host>/group        while it is written
                                           /record.json  the record to be, until it is moved into place

An object store has no rename: there the group is written where it will stay, under a name that nobody else takes, while
record.json names the video it will belong to; only the commit record decides.

An attempt has a folder of its own, so writers never meet in one. Kill it at any moment: the record is the old one or
the new one, and what is left over is found by `maintenance.sweep`, through the writer in the folder's name.
"""

import secrets
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stages.atomic import sync, sync_tree
from stages.cache.files.errors import DamagedCacheError, storage_errors
from stages.cache.files.files import Directory, SmallFiles
from stages.cache.files.remote_files import RemoteFiles
from stages.cache.files.writers import current_writer
from stages.cache.source import VideoSource
from stages.cache.stores.commit import (
    COMMITS,
    VIDEOS,
    ArrayRecord,
    CommitRecord,
    content_checksum,
    load_record,
    record_name,
)
from stages.cache.stores.zarr_store import group_files, write_group

TMP = "tmp"
PENDING_RECORD = "record.json"


def commit_video(
    root: Path, video: str, fingerprint: str, arrays: Mapping[str, np.ndarray], source: VideoSource | None
) -> CommitRecord:
    """Commit checked `arrays` (with `times_s` [T] float64 among them) as the new revision of `video`.

    If two writers race on one video, the record written last wins; the other's group is an orphan that `sweep` removes.

    Raises:
        UserError: the disk is full, read-only or forbidden; the old revision is then still in place.
    """
    target = root / COMMITS / record_name(root, video)
    attempt = root / TMP / attempt_name()
    needed_bytes = sum(array.nbytes for array in arrays.values())
    try:
        with storage_errors(root, needed_bytes):
            attempt.mkdir(parents=True)
            _make_lasting(root, root / VIDEOS, target.parent)
            written = write_group(attempt / "group", arrays)
            record = _record_of(video, fingerprint, arrays["times_s"], written, source)
            (attempt / PENDING_RECORD).write_bytes(content_of(record))
            sync_tree(attempt)
            (attempt / "group").rename(root / VIDEOS / record.group)
            sync(root / VIDEOS)
            previous = _previous_group(Directory(root), video)
            (attempt / PENDING_RECORD).replace(target)
            sync(target.parent)
    finally:
        # Also after a failure; what cannot be removed now stays recognisable as this writer's and is swept later.
        shutil.rmtree(attempt, ignore_errors=True)
    if previous is not None:
        # A reader that still holds the old record finds the group gone and asks for the record again.
        shutil.rmtree(root / VIDEOS / previous, ignore_errors=True)
    return record


def commit_at_url(
    files: RemoteFiles, video: str, fingerprint: str, arrays: Mapping[str, np.ndarray], source: VideoSource | None
) -> CommitRecord:
    """Do what `commit_video` does, at a URL.

    Raises:
        UserError: the store refuses or does not answer; the old revision is then still in place.
    """
    written, contents = group_files(arrays)
    record = _record_of(video, fingerprint, arrays["times_s"], written, source)
    attempt = f"{TMP}/{attempt_name()}"
    try:
        # First of all, so that nobody who looks around takes the group for an orphan.
        files.add_file(attempt, PENDING_RECORD, content_of(record))
        files.add_files({f"{VIDEOS}/{record.group}/{path}": content for path, content in contents.items()})
        previous = _previous_group(files, video)
        files.add_file(COMMITS, record_name(files.root, video), content_of(record))
    finally:
        files.remove(f"{attempt}/{PENDING_RECORD}")
    if previous is not None:
        files.remove_tree(f"{VIDEOS}/{previous}")
    return record


def attempt_name() -> str:
    """A name in `tmp/` that nobody else takes, and that names the writer."""
    return f"{secrets.token_hex(4)}.{current_writer()}"


def _make_lasting(root: Path, *folders: Path) -> None:
    """Make folders in `root` that are not there; what is put into one must not be lost with it in a power cut."""
    missing = [folder for folder in folders if not folder.is_dir()]
    for folder in missing:
        folder.mkdir(exist_ok=True)
    if missing:
        sync(root)


def _record_of(
    video: str, fingerprint: str, times_s: np.ndarray, written: dict[str, ArrayRecord], source: VideoSource | None
) -> CommitRecord:
    return CommitRecord(
        format_version=1,
        video=video,
        group=f"{video}.{secrets.token_hex(4)}",
        fingerprint=fingerprint,
        arrays=written,
        checksum=content_checksum(video, fingerprint, times_s, written),
        committed=datetime.now(UTC),
        times_s=tuple(times_s.tolist()),
        source=source,
    )


def content_of(record: CommitRecord) -> bytes:
    """What stands in the file of a commit record."""
    return (record.model_dump_json() + "\n").encode()


def _previous_group(files: SmallFiles, video: str) -> str | None:
    try:
        previous = load_record(files, video)
    except DamagedCacheError:
        return None  # it is about to be replaced; the sweep finds its group
    return previous.group if previous else None
