"""That every process which works for a command runs the command's own code, wherever it is started.

Python and Ray look into the working directory first, and `model`, `stages` and `pipeline` are names that anybody's
project may have.
"""

import hashlib
import os
import sys
from pathlib import Path

from stages.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
"""The folder that this code was imported from: a clone, or an environment's site-packages."""
_PACKAGES = ("model", "pipeline", "stages")


def environment() -> dict[str, str]:
    """What a Python process's environment must hold for it to import this code, wherever it is started."""
    others = (path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(ROOT)))
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *others]), "PYTHONSAFEPATH": "1"}


def digest() -> str:
    """SHA-256 of every source file of this code."""
    whole = hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (ROOT / package).rglob("*.py")):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
        whole.update(content)
    return whole.hexdigest()


def require_same(expected: str) -> None:
    """UserError in a process, perhaps of another machine, that runs other code than a command with this `digest`."""
    if digest() != expected:
        raise UserError(
            "a worker would run other code than the command",
            where=ROOT,
            received=f"Python {sys.version.split()[0]} on {os.uname().nodename}",
            hint="install the same version on every node of the cluster, and change nothing while a command runs",
        )
