"""SIGTERM and Ctrl-C at random moments of every command: the promised code, one line, and no process left.

`SIGNALS=200` sends so many in total instead of a few to each command.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.process_tree import command_line
from tests.conftest import run_pipeline
from tests.video_files import RATE_FPS, write_video

SIGNALS = int(os.environ.get("SIGNALS", "16"))
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
SOON_S = 60.0
# What each process of a command inherits.
MARK = "PIPELINE_TEST_OF_SIGNALS"
# The start of Python until the command takes signals: CPU time, which does not depend on who else works here.
READY_CPU_S = 0.1
LONG_FRAMES = 2400

CARD = """\
name: long
title: One long video
annotations: {format: jsonl, file: samples.jsonl}
videos: {pattern: "{id}.mp4"}
text: caption
tasks: {scene: {prompt: "what is the {} of the movie?", labels: [airport, hotel]}}
frame_rule: {kind: uniform, num_frames: 2000, index_fps: 10, jitter: true}
"""
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
SIZES = ("--size", "train=8", "--size", "val=4", "--size", "test=4")
DATA = ("--preset", "tiny", "--videos", "data/videos", "--annotations", "data/annotations", "--cache", "cache")
LONG = ("--preset", "tiny", "--dataset", "card.yaml", "--videos", ".", "--annotations", ".", "--cache", "new/cache")
TRAIN = ("--task", "scene", "--set", "train.epochs=8", "--set", "train.batch_size=2", "--set", "train.loader_workers=1")
TRAIN += ("--set", "run.folder=new/runs")


@dataclass(frozen=True)
class Command:
    """Its words, and for how long after its start a signal may fall into it on a quiet machine."""

    words: tuple[str, ...]
    span_s: float


COMMANDS = {
    "synthesize": Command(("synthesize", "new/data", *SIZES), 3),
    "rehearse": Command(("rehearse", "--preset", "tiny"), 20),
    "plan": Command(("plan", *LONG, "--calibrate-s", "4"), 9),
    "train": Command(("train", *DATA, *TRAIN), 8),
    "evaluate": Command(("evaluate", "--run", "runs/one", "--output", "new"), 6),
    "extract": Command(("extract", *LONG), 20),
    "train-workers": Command(("train", *DATA, *TRAIN, "--processes", "2"), 25),
    "ablate": Command(("ablate", "--study", "two.yaml", "--seeds", "1", *DATA, *TRAIN), 25),
    "demo": Command(("demo", "--folder", "new", "--no-open"), 60),
}


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """The small world, a trained run, and one long video."""
    made = tmp_path_factory.mktemp("signals")
    write_video(made / "long.mp4", count=LONG_FRAMES, height=48, width=64)
    (made / "card.yaml").write_text(CARD, encoding="utf-8")
    (made / "two.yaml").write_text(STUDY, encoding="utf-8")
    row = {"video": "long", "duration_s": LONG_FRAMES / RATE_FPS, "task": "scene", "question": "scene"}
    (made / "samples.jsonl").write_text(
        json.dumps(row | {"answer": "hotel", "split": "train"}) + "\n", encoding="utf-8"
    )
    (made / "cache").symlink_to(world.cache)
    (made / "data").symlink_to(world.folder / "data")
    brief = ("--task", "scene", "--set", "train.epochs=1", "--name", "one")
    done = run_pipeline("train", *DATA, *brief, cwd=made)
    assert done.returncode == 0, done.stderr
    return made


class Started:
    """A command that has just begun, in a process group of its own."""

    def __init__(self, command, folder):
        shutil.rmtree(folder / "new", ignore_errors=True)
        self.mark = f"{MARK}={uuid.uuid4()}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *command.words],
            cwd=folder,
            env={**os.environ, **dict([self.mark.split("=")]), **temporary_folder(command, folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._wait_until_it_takes_signals()

    def _wait_until_it_takes_signals(self):
        about = Path(f"/proc/{self.process.pid}")
        until = time.monotonic() + SOON_S
        while not int(re.search(r"^SigBlk:\t(\w+)$", (about / "status").read_text(), re.MULTILINE)[1], 16):
            assert time.monotonic() < until
            assert self.process.poll() is None
            time.sleep(0.001)
        ticks = map(int, (about / "stat").read_text().rpartition(")")[2].split()[11:13])
        assert sum(ticks) / os.sysconf("SC_CLK_TCK") < READY_CPU_S

    def send(self, number, to_group):
        try:
            (os.killpg if to_group else os.kill)(self.process.pid, number)
        except ProcessLookupError:
            return

    def end(self):
        """Exit code, what was said, and the processes that are left."""
        _, said = self.process.communicate(timeout=SOON_S)
        until = time.monotonic() + 3
        while (left := self._left()) and time.monotonic() < until:
            time.sleep(0.05)
        return self.process.returncode, said, left

    def _left(self):
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark in environment.read_text(errors="replace").split("\0"):
                    found.append(command_line(int(environment.parent.name)))
            except OSError:
                continue  # it has ended, or is not ours
        return found


def temporary_folder(command, folder):
    """Below the folder, for a command that makes one where temporary folders are; Ray's paths would become too long."""
    if command.words[0] != "rehearse":
        return {}
    (folder / "new").mkdir()
    return {"TMPDIR": str(folder / "new")}


def stop_at_random(name, folder, chance, *, share=1.0):
    """Start a command and stop it, by one or two signals to it or to its group; whether it was still at work.

    The signal falls into the first `share` of the command's span.
    """
    command = COMMANDS[name]
    number = chance.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    to_group, twice, wait_s = chance.random() < 0.5, chance.random() < 0.25, chance.random() * share * command.span_s
    again_s = chance.random()
    started = Started(command, folder)
    time.sleep(wait_s)
    started.send(number, to_group)
    if twice:
        time.sleep(again_s)
        started.send(number, to_group)
    code, said, left = started.end()
    about = f"{name}: {number.name} after {wait_s:.2f} s, {to_group=}, {twice=}: exit code {code}\n{said}"
    assert not left, f"{about}\nleft: {left}"
    assert "Traceback" not in said, about
    kinds = (".plan-*", "*-train-*", "diff-lmm-rehearsal-*")
    scratch = [path for kind in kinds for path in folder.rglob(kind)]
    assert not scratch, f"{about}\nleft: {scratch}"
    told = [line for line in said.splitlines() if re.search(r"stopped (by|after|before)|interrupted", line)]
    if code == 0:  # it was faster than the signal
        assert not told, about
        return False
    assert code == CODES[number], about
    assert len(told) == 1, about
    assert said.splitlines()[-1] == told[0], about
    return True


@pytest.mark.parametrize("name", ["synthesize", "evaluate", "extract", "rehearse"])
def test_a_signal_at_a_random_moment_ends_a_command_as_promised(name, folder):
    stop_at_random(name, folder, random.Random(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_signals_at_many_random_moments_end_every_command_as_promised(name, folder):
    chance, sent = random.Random(f"{name} again"), max(1, round(SIGNALS / len(COMMANDS)))
    at_work = sum(stop_at_random(name, folder, chance) for _ in range(sent))
    share = 1.0
    while not at_work:  # this machine is faster than the span
        share /= 2
        at_work, sent = int(stop_at_random(name, folder, chance, share=share)), sent + 1
    sys.stderr.write(f"{name}: {sent} stops, {at_work} of them while it was at work; no wrong code, no process left\n")


def test_a_signal_after_the_work_is_done_changes_nothing(tmp_path):
    """While the interpreter ends; processes of its own, which multiprocessing started, had let the signals through."""
    small = ("--size", "train=2", "--size", "val=1", "--size", "test=1")
    command = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "synthesize", tmp_path / "data", *small],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert command.stdout.readline()  # the answer, after which there is nothing left to do
    os.killpg(command.pid, signal.SIGTERM)
    command.communicate(timeout=SOON_S)
    assert command.returncode in (0, 75)
