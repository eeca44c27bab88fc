"""What is known of a frozen network's checkpoint before it is loaded, and remembered for as long as its files stay.

Hashing the weights of a published encoder takes longer than all else that an extraction with nothing left to do does.
A description is taken from here only if each file that was looked at is the very file of then.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model.config import Settings
from stages.atomic import atomic_write_text
from stages.cache.fingerprint import Scalar
from stages.records import FrozenRecord
from stages.weights.repository import LoadingReport, Repository, watch_files

_LOG = logging.getLogger(__name__)

# A file that was changed a moment ago may change again without another time stamp: clocks of file systems are coarse.
_SETTLED_S = 3.0

# To be raised when the code comes to describe the same files in another way.
_FORMAT = 1


@dataclass(frozen=True)
class FrozenSource:
    """A frozen network's checkpoint, opened but not loaded.

    Attributes:
        size_px: side of the square picture the network takes.
        digest: SHA-256 over the weights that the network reads.
        facts: what else the checkpoint decides of a feature, by name.
        loading: of each checkpoint, what the network takes and leaves; none where weights are random.
    """

    size_px: int
    digest: str
    facts: dict[str, Scalar] = field(default_factory=dict)
    loading: tuple[LoadingReport, ...] = ()


class _File(FrozenRecord):
    """A file of a repository as it was; without `identity` it was not there."""

    source: str
    name: str
    identity: tuple[str, int, int, int] | None


class _Entry(FrozenRecord):
    files: tuple[_File, ...]
    described: FrozenSource


def remembered(kind: str, config: Settings, describe: Callable[[], FrozenSource]) -> FrozenSource:
    """What `describe` returned when it last saw these files under these settings, else what it returns now.

    Args:
        describe: reads and hashes; every file that it looks at must be found through a `Repository`.
    """
    path = user_cache_folder() / "descriptions" / f"{_key(kind, config)}.json"
    entry = _load(path)
    if entry is not None and all(_as_it_is(file.source, file.name) == file for file in entry.files):
        return entry.described
    with watch_files() as seen:
        described = describe()
    _save(path, described, seen)
    return described


def user_cache_folder() -> Path:
    """Where this project keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diff-lmm"


def _key(kind: str, config: Settings) -> str:
    named = f"{_FORMAT} {kind} {config.model_dump_json()} {version('transformers')}"
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def _load(path: Path) -> _Entry | None:
    try:
        return _Entry.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None  # it is written again


def _save(path: Path, described: FrozenSource, seen: Mapping[tuple[str, str], Path | None]) -> None:
    found = [file for file in seen.values() if file is not None]
    if not found or max(file.stat().st_mtime for file in found) > time.time() - _SETTLED_S:
        return
    entry = _Entry(files=tuple(_as_it_is(*place) for place in seen), described=described)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, entry.model_dump_json())
    except OSError as error:
        _LOG.info("what was read of the weights cannot be remembered: %s", error)


def _as_it_is(source: str, name: str) -> _File:
    path = Repository(source).find(name)
    if path is None:
        return _File(source=source, name=name, identity=None)
    resolved = path.resolve()
    facts = resolved.stat()
    identity = str(resolved), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
    return _File(source=source, name=name, identity=identity)


def random_digest(seed: int, described: Mapping[str, Any]) -> str:
    """Stands for weights that follow from a seed and an architecture."""
    architecture = json.dumps(described, sort_keys=True, default=str)
    return f"random {seed} {hashlib.sha256(architecture.encode()).hexdigest()}"
