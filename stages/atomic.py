"""Files that are either absent, old, or whole: write beside, flush to disk, rename."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on normal exit it is synced and renamed over `target`.

    A kill or an exception at any moment leaves the old `target` (or none) and never a partial one. An exception
    removes the temporary file; after a kill it stays, named `.<target>.<random>.tmp`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        with usual_permissions(temporary):
            yield temporary
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def usual_permissions(path: Path) -> Iterator[None]:
    """Whatever the block writes at `path`, a new file, ends with the permissions that the umask gives any new file.

    So others of a cluster can read what is shared. safetensors writes files that only their owner can read.
    """
    path.touch(exist_ok=False)
    permissions = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(permissions)


def atomic_write_text(target: Path, text: str) -> None:
    """Replace `target` by `text` (UTF-8) in one step."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Force a file's bytes, so that a rename never outlives its content, or a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force all files and folders of a tree to disk.

    One after the other: threads for it make a single commit faster, but no more of them when several commit at once.
    """
    for path in (folder, *folder.rglob("*")):
        sync(path)
