"""The user's cache folder."""

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """Where this project keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diff-lmm"
