"""A training step that does not fit into the memory, by the system's own limit: it goes on with equal losses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_world import dropping_out, make, near

ROOT = Path(__file__).parents[2]
# A batch of 32 takes more than this, one of 8 less.
LEFT_BYTES, PLENTY_BYTES = 60_000_000, 2_000_000_000
SETTINGS = ("train.epochs=2", "train.batch_size=32", "train.kd_frames=all", "train.trackers=[]")
# Sums of other parts are rounded otherwise; with other dropout masks the losses differ in the second digit.
ROUNDING = 2e-5
LINE = "too little memory for a step: going on with train.micro_batch_size={} and train.frames_per_chunk=6, the losses"


def train(world, name, more_bytes, *settings):
    """Train in a process of its own; its run's folder and what it wrote to stderr."""
    more = [dropping_out(world), *settings]
    done = subprocess.run(
        [sys.executable, "-m", "tests.limited_training", world.folder, name, str(more_bytes), *SETTINGS, *more],
        # So that what is freed goes back to the system, and the limit is one of what is held.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return world.run_folder(name), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's")
def test_a_step_that_does_not_fit_is_taken_again_in_halves_with_equal_losses(tmp_path):
    world = make(tmp_path / "world")
    whole, quiet = train(world, "whole", PLENTY_BYTES, "train.micro_batch_size=32")
    assert "too little memory" not in quiet
    halved, told = train(world, "halved", LEFT_BYTES, "train.micro_batch_size=32")
    lines = re.findall(r"^too little memory.*", told, flags=re.MULTILINE)
    assert [line.partition(" are the same")[0] for line in lines] == [LINE.format(16), LINE.format(8)]
    chosen = [json.loads((run / "run.json").read_text())["at_once"] for run in (whole, halved)]
    assert [one["train.micro_batch_size"] for one in chosen] == [32, 8]
    near(halved, whole, ROUNDING)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's")
def test_by_itself_it_chooses_what_fits_and_no_step_is_taken_twice(tmp_path):
    run, told = train(make(tmp_path / "world"), "auto", LEFT_BYTES)
    assert "too little memory" not in told
    assert 1 <= json.loads((run / "run.json").read_text())["at_once"]["train.micro_batch_size"] < 16
