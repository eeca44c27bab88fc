"""What several rooms ask of the file system."""

import hashlib
from pathlib import Path


def nearest_existing(path: Path) -> Path:
    """What `path` names, or the nearest place above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes; OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
