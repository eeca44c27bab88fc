"""A disk of a few kilobytes, to be filled up."""

import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def small_disk_at(folder, size):
    """Mount a disk of `size` (as in "512k") at a new folder; skip the test where that is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
