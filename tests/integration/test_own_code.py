"""Every process runs the command's own code, in a folder that holds modules named as ours and as its libraries are."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.settings.config import overlay, resolve
from stages import own_code
from stages.decode import DecodeChild, FrameRequest
from stages.decode.lengths import read_lengths
from stages.errors import UserError
from tests.video_files import write_video

NAMES = ("model/__init__.py", "stages/__init__.py", "pipeline/__init__.py", "ray.py", "numpy.py", "random.py", "av.py")
# Noted, because some libraries try an import and go on without it.
HOSTILE = "open({noted!r}, 'a').write(f'{{__name__}}\\n')\nraise ImportError('from the working directory')\n"
STUDY = """\
name: two
title: With a teacher and without
reproduces: figure-3
varies: [alignment.kd_weight]
base: with
members:
  - {name: with, settings: {alignment.kd_weight: 1.0}}
  - {name: without, settings: {alignment.kd_weight: 0.0}}
"""
DATA = ("--preset", "tiny", "--videos", "data/videos", "--annotations", "data/annotations", "--cache", "cache")
BRIEFLY = (
    "--task",
    "scene",
    "--set",
    "train.epochs=1",
    "--set",
    "train.batch_size=8",
    "--set",
    "train.loader_workers=1",
)
SIZES = ("--size", "train=8", "--size", "val=4", "--size", "test=4")
VIDEO = "data/videos/test_0000.mp4"


class Hostile:
    """The folder, and the command that an environment installs, run in it."""

    def __init__(self, folder):
        self.folder, self.noted = folder, folder / "imported"
        for name in NAMES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(HOSTILE.format(noted=str(self.noted)), encoding="utf-8")
        (folder / "two.yaml").write_text(STUDY, encoding="utf-8")

    def run(self, *arguments, program=None):
        program = program or [Path(sys.executable).with_name("pipeline")]
        # As a shell has it: what a test or a command before has set for its children is not there.
        environment = {name: value for name, value in os.environ.items() if name not in own_code.environment()}
        done = subprocess.run(
            [*map(str, program), *map(str, arguments)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        self.require_unseen()
        assert done.returncode == 0, done.stderr
        return done

    def require_unseen(self):
        assert not self.noted.exists(), f"imported from the working directory: {self.noted.read_text()}"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    made = Hostile(tmp_path_factory.mktemp("hostile"))
    made.run("synthesize", "data", *SIZES)
    return made


def test_children_of_a_program_import_its_own_code(tmp_path, monkeypatch):
    video = write_video(tmp_path / "video.mp4")
    made = Hostile(tmp_path)
    monkeypatch.chdir(tmp_path)
    with DecodeChild() as child:
        decoded = child.decode(FrameRequest(video, np.array([0.0]), ((8, 8),), "pyav", 0.1), 60.0)
    assert decoded.views[0].shape == (1, 8, 8, 3)
    ((_, length),) = read_lengths({"video": video})
    assert isinstance(length, float), length
    made.require_unseen()


def test_a_module_run_from_elsewhere_leaves_the_working_directory_alone(tmp_path):
    made = Hostile(tmp_path)
    for name in ("pipeline", "stages", "model"):  # with these Python itself would run what is here
        (tmp_path / name / "__init__.py").unlink()
        (tmp_path / name).rmdir()
    made.run("synthesize", "data", *SIZES, program=[sys.executable, "-m", "pipeline"])


def test_plan_and_doctor_measure_with_their_own_code(hostile):
    assert "frames/s" in hostile.run("plan", *DATA, "--calibrate-s", "2").stdout
    hostile.run("doctor", *DATA)


@pytest.mark.slow
def test_every_command_with_processes_runs_its_own_code(hostile):
    hostile.run("extract", *DATA)
    hostile.run("train", *DATA, *BRIEFLY, "--name", "one")
    hostile.run("evaluate", "--run", "runs/one")
    hostile.run("predict", VIDEO, "--question", "where does it take place?", "--run", "runs/one")
    hostile.run("train", *DATA, *BRIEFLY, "--name", "several", "--processes", "2")
    hostile.run("ablate", "--study", "two.yaml", "--seeds", "1", *DATA, *BRIEFLY)


def test_other_code_than_the_commands_is_refused():
    own_code.require_same(own_code.digest())
    with pytest.raises(UserError, match="a worker would run other code than the command"):
        own_code.require_same("of another version")


@pytest.mark.slow
def test_training_processes_that_would_run_other_code_are_refused_and_say_so(monkeypatch, tmp_path):
    from pipeline.runs.processes import run_together
    from stages.signals import StopRequest
    from tests.training_world import make

    world = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = overlay(world.config(), {"train.processes": 2, "run.folder": "runs", "run.name": "one"}, "test")
    monkeypatch.setattr(own_code, "digest", lambda: "of another version")
    with pytest.raises(UserError, match="a worker would run other code than the command"):
        run_together(config, tmp_path / "runs" / "one", resume=False, request=StopRequest(), again="")


@pytest.mark.slow
def test_ray_processes_that_would_run_other_code_are_refused_and_say_so(monkeypatch, tmp_path):
    from stages.cluster.connect import cluster
    from stages.cluster.shares import Share
    from stages.config import ExtractConfig
    from stages.extract.hand_out import process_all
    from stages.extract.worker import ExtractionJob, VideoTask
    from stages.studies import trials

    config = resolve(preset="tiny", options={}, overrides=[]).config
    # Of this process alone: its workers look at the code that they have.
    monkeypatch.setattr(own_code, "digest", lambda: "of another version")
    ended = {}
    with cluster(None):
        job = ExtractionJob(config.encoder, config.teacher, ExtractConfig(), str(tmp_path))
        task = VideoTask("video", str(tmp_path / "video.mp4"), np.array([0.0]))
        with pytest.raises(UserError, match=r"could not start: .*a worker would run other code than the command"):
            list(process_all([task], job))
        trials.run_trials(
            {"one": ""},
            lambda _trial: None,
            Share(1, 1.0, 0.0),
            on_start=lambda _name: None,
            on_end=lambda name, reason, _seconds: ended.update({name: reason}),
        )
        assert "a worker would run other code than the command" in ended["one"]
