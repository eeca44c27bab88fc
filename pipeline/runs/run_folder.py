"""A run's folder: `config.yaml`, `run.json` (cache fingerprint, versions), checkpoints, metrics, predictions."""

import errno
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.settings.config import PipelineConfig, dump_yaml, load_yaml
from stages.atomic import atomic_write_text
from stages.errors import UserError
from stages.files import nearest_existing

CONFIG, STAMP = "config.yaml", "run.json"
_LONGER, _PARTS = "more_epochs", "at_once"


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @classmethod
    def create(cls, path: Path, config: PipelineConfig, stamp: dict[str, Any]) -> "RunFolder":
        """Make the folder and write configuration and stamp.

        Raises:
            UserError: a run of that name is there already.
        """
        cls.require_free(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run._write_stamp({**stamp, **versions()})
        run.keep(config)
        return run

    def keep(self, config: PipelineConfig) -> None:
        """Write the configuration."""
        atomic_write_text(self.path / CONFIG, dump_yaml(config))

    def note_more_epochs(self, *, step: int, before: int, now: int) -> None:
        """Add to the stamp that the training was made longer after so many steps."""
        stamp = self.stamp()
        self._write_stamp({**stamp, _LONGER: [*stamp.get(_LONGER, []), {"step": step, "before": before, "now": now}]})

    def note_parts(self, parts: dict[str, int]) -> None:
        """Have the stamp say how much goes through the networks at once."""
        self._write_stamp({**self.stamp(), _PARTS: parts})

    def _write_stamp(self, content: dict[str, Any]) -> None:
        atomic_write_text(self.path / STAMP, json.dumps(content, indent=2, sort_keys=True) + "\n")

    @staticmethod
    def require_free(path: Path) -> None:
        """Nothing if a new run could begin there.

        Raises:
            UserError: a run is there already.
            OSError: its folder cannot be made: raised before minutes are spent on what comes first.
        """
        if (path / CONFIG).exists():
            raise UserError(
                "a run of this name is there already",
                where=path,
                hint="add --resume to go on with it, or give another --name",
            )
        above = nearest_existing(path)
        code = 0
        if not above.is_dir():
            code = errno.ENOTDIR
        elif not os.access(above, os.W_OK | os.X_OK):
            code = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
        if code:
            raise OSError(code, os.strerror(code), str(path))

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run; UserError if the folder is none."""
        if not (path / CONFIG).is_file():
            raise UserError(f"not a run: there is no {CONFIG}", where=path, hint="train one first: pipeline train")
        return cls(path)

    def config(self) -> PipelineConfig:
        """The configuration the run was trained with."""
        return load_yaml(self.path / CONFIG)

    def stamp(self) -> dict[str, Any]:
        """Cache fingerprint, counts and versions."""
        return self.read_json(STAMP)

    def require_same(self, now: dict[str, Any], keys: Sequence[str]) -> None:
        """Stop if what the run was stamped with at its start is not what is found now; UserError names the first."""
        then = self.stamp()
        for key in keys:
            if then.get(key) != now[key]:
                raise UserError(
                    f"{key} changed since the run began: it was {then.get(key)!r}",
                    where=self.path,
                    received=now[key],
                    hint="give the cache that the run began with, or start a new run with another --name",
                )

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the run's JSON files; UserError if it is absent or broken."""
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError("file is missing", where=self.path / name) from error
        except ValueError as error:
            raise UserError(f"not valid JSON: {error}", where=self.path / name) from error
        if not isinstance(content, dict):
            raise UserError("must hold one JSON object", where=self.path / name, received=type(content).__name__)
        return content


def file_name(stem: str, split: str, suffix: str) -> str:
    """Name of a run's result file: the test split, which is what is reported, has the plain name."""
    return f"{stem}.{suffix}" if split == "test" else f"{stem}-{split}.{suffix}"


def versions() -> dict[str, Any]:
    """When and by what a file is made: time, machine, packages, the source's commit."""
    packages = ("diff-lmm", "torch", "transformers", "zarr", "numpy")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in packages},
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """The source's commit, with a + if it was changed since; None outside a checkout."""
    source = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],  # noqa: S607
            cwd=source,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
