"""What a user may get wrong: each mistake ends in one clear line and a failing status, and changes no file.

The commands run in this process, through the entry point that the shell calls; their caches hold random arrays.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.runs.run_folder import RunFolder
from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.cache import FeatureCache
from stages.data.frame_plan import plan_frames
from stages.data.synthetic import generate


@dataclass(frozen=True)
class Made:
    """Twelve synthetic videos, a full cache of them, one that lacks two videos, and a run that was never trained."""

    folder: Path

    @property
    def videos(self):
        return self.folder / "data" / "videos"

    @property
    def annotations(self):
        return self.folder / "data" / "annotations"

    @property
    def cache(self):
        return self.folder / "cache"

    @property
    def run(self):
        return self.folder / "runs" / "taken"

    def options(self, **changed):
        options = {
            "preset": "tiny",
            "videos": self.videos,
            "annotations": self.annotations,
            "cache": self.cache,
            "set": f"run.folder={self.folder / 'runs'}",
        }
        return [str(part) for name, value in {**options, **changed}.items() for part in (f"--{name}", value)]

    def config(self, cache):
        options = {"data.videos": self.videos, "data.annotations": self.annotations, "cache.root": cache}
        overrides = [f"run.folder={self.folder / 'runs'}", "run.name=taken"]
        return resolve(
            preset="tiny", options={key: str(value) for key, value in options.items()}, overrides=overrides
        ).config


def fill_cache(root, config, *, leave_out=()):
    """What extraction would leave behind, with random numbers in place of features."""
    from stages.frozen.identity import fingerprint, settle_precision

    cache = FeatureCache.create_or_open(root, fingerprint(config, settle_precision(config.extract)))
    random = np.random.default_rng(0)
    times = plan_frames(locations.manifest_of(config)).times_s
    with cache.ledger.writer() as ledger:
        for video in sorted(set(times) - set(leave_out)):
            frames = len(times[video])
            record = cache.write_video(
                video,
                times_s=times[video],
                features=random.standard_normal((frames, 65, 96)).astype(np.float16),
                targets=random.standard_normal((frames, 112)).astype(np.float32),
            )
            ledger.done(video, checksum=record.checksum, attempts=1)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    world = Made(tmp_path_factory.mktemp("wrong-inputs"))
    generate(world.folder / "data", seed=1, videos_per_split={"train": 4, "val": 4, "test": 4}, workers=1)
    fill_cache(world.cache, world.config(world.cache))
    fill_cache(world.folder / "half", world.config(world.folder / "half"), leave_out=["train_0001", "train_0003"])
    stamp = {"fingerprint": FeatureCache.open(world.cache).fingerprint.digest}
    RunFolder.create(world.run, world.config(world.cache), stamp)
    return world


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refused(made, tmp_path, monkeypatch, capfd):
    """Run a command that must fail; its only line without the leading "error: "."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        before = files_below(made.folder) | files_below(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert ended.value.code == 2
        assert said.out == ""
        assert "Traceback" not in said.err
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1, said.err
        assert files_below(made.folder) | files_below(tmp_path) == before, "something was written"
        return said.err.removeprefix("error: ").removesuffix("\n")

    return run
