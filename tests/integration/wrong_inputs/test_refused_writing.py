"""Disks and folders that refuse to be written."""

import os
import re
import subprocess
import sys

import pytest

from pipeline.cli import main
from pipeline.settings import locations
from stages.cache import FeatureCache
from stages.data.frame_plan import plan_frames
from tests.small_disk import small_disk_at


def test_a_run_below_a_file(made, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused("train", *made.options(set=f"run.folder={tmp_path / 'file'}", name="new")) == (
        f"{tmp_path / 'file' / 'new'}: a part of this path is a file, not a directory. "
        "Mend this or name another folder, then run it again"
    )


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_at(tmp_path / "disk", "512k") as folder:
        yield folder


def test_a_read_only_folder_for_runs(made, refused, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert refused("train", *made.options(set=f"run.folder={small_disk}", name="new")) == (
        f"{small_disk / 'new'}: the file system is read-only. Mend this or name another folder, then run it again"
    )


def test_a_disk_that_fills_up_during_training(made, small_disk, monkeypatch, capfd):
    """A checkpoint does not fit; the run can be gone on with when there is space."""
    arguments = [*made.options(set=f"run.folder={small_disk}", name="new", task="scene"), "--set", "train.epochs=1"]
    monkeypatch.setattr(sys, "argv", ["pipeline", "train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {small_disk}/new/checkpoints: the checkpoint cannot be written: ")
    assert said.endswith("Free space there, then go on with --resume\n")
    assert list((small_disk / "new" / "checkpoints").iterdir()) == []

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    monkeypatch.setattr(sys, "argv", ["pipeline", "train", *arguments, "--resume"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_during_extraction(made, small_disk):
    """Through Ray, in a process of its own: what is committed stays and is whole."""
    cache = small_disk / "cache"
    command = [sys.executable, "-m", "pipeline", "extract", *made.options(cache=cache)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--set", "extract.decode_workers=1"], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"the disk is full; writing here needs [\d,]+ bytes and nothing was committed\. Free space", line)
    assert str(cache) in line
    opened = FeatureCache.open(cache)
    status = opened.ledger.status(plan_frames(locations.manifest_of(made.config(cache))).times_s)
    assert status.done
    assert status.pending
    assert status.failed == {}, "a full disk is no fault of a video"
    assert all(opened.verify(video).ok for video in status.done)
