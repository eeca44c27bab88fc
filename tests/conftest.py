"""What every test may rely on: no hub, no user's cache, and one small world made by the real commands, once."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

VIDEOS_PER_SPLIT = {"train": 16, "val": 4, "test": 4}


# A suite started in the background inherits an ignored Ctrl-C, and so would every process it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before any test imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session", autouse=True)
def _isolated_user_cache(tmp_path_factory):
    """What the program remembers of the networks is this session's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("user-cache"))


def run_pipeline(*arguments, cwd=None, timeout=240):
    """Run the command line as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def pipeline(monkeypatch, capfd):
    """Run a command in this process; what it printed for machines and for people."""
    from tests.in_this_process import in_this_process

    return in_this_process(monkeypatch, capfd)


@dataclass(frozen=True)
class SmallWorld:
    """A few synthetic videos, their cache, and the options that name both."""

    folder: Path

    @property
    def cache(self):
        return self.folder / "cache"

    @property
    def videos(self):
        return self.folder / "data" / "videos"

    def options(self, **changed):
        options = {
            "--preset": "tiny",
            "--videos": self.videos,
            "--annotations": self.folder / "data" / "annotations",
            "--cache": self.cache,
        }
        options.update({f"--{name}": value for name, value in changed.items()})
        return [str(part) for pair in options.items() for part in pair]

    def run(self, *arguments, **keywords):
        return run_pipeline(*arguments, cwd=self.folder, **keywords)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Videos generated and extracted by `pipeline extract` on a real local Ray."""
    from stages.data.synthetic import generate

    made = SmallWorld(tmp_path_factory.mktemp("world"))
    generate(made.folder / "data", seed=1, videos_per_split=VIDEOS_PER_SPLIT, workers=1)
    done = made.run("extract", *made.options(), "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["done"] == summary["planned"] == sum(VIDEOS_PER_SPLIT.values())
    return made
