"""Files that are beside an absent one and are named almost like it."""

import os
from collections.abc import Iterable
from pathlib import Path


def named_alike(absent: Iterable[Path]) -> dict[Path, str]:
    """Of absent files, those beside which there are others that differ only in extension or capitals; and their names.

    Each folder is listed once.
    """
    folders: dict[Path, dict[str, list[str]]] = {}
    found = {}
    for path in absent:
        if path.parent not in folders:
            listed = folders[path.parent] = {}
            for other in sorted(path.parent.iterdir()) if os.access(path.parent, os.R_OK) else ():
                listed.setdefault(other.stem.lower(), []).append(other.name)
        if alike := folders[path.parent].get(path.stem.lower()):
            found[path] = ", ".join(alike)
    return found
