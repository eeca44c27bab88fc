"""`pipeline ablate` on real Ray, with its driver killed, a worker killed and a member that cannot be trained."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STUDY = """\
name: small
title: Two lambdas and a level that is not there
reproduces: figure-3
varies: [alignment.kd_weight, alignment.levels]
base: "on"
members:
  - {name: "on", settings: {alignment.kd_weight: 1.0}, paper: {table: table-1, row: Diff-LMM}}
  - {name: "off", settings: {alignment.kd_weight: 0.0}, paper: {table: table-1, row: MA-LMM}}
  - {name: broken, settings: {alignment.levels: [99]}}
"""
TRAININGS = ["on-seed42", "on-seed43", "off-seed42", "off-seed43", "broken-seed42", "broken-seed43"]
KILLED = "off-seed43"
SOON_S = 180.0


class Small:
    """The study in a folder of its own, over the shared world's cache."""

    def __init__(self, world, folder):
        self.world, self.folder = world, folder / "runs" / "small"
        (folder / "small.yaml").write_text(STUDY, encoding="utf-8")
        settings = ["train.epochs=3", "train.batch_size=8", "train.kd_frames=1", "train.save_every_steps=2"]
        settings += ["evaluate.resamples=200", f"run.folder={folder / 'runs'}"]
        self.command = [
            *("ablate", "--study", str(folder / "small.yaml"), "--seeds", "2", "--parallel", "2", "--json"),
            *world.options(task="scene"),
            *(part for setting in settings for part in ("--set", setting)),
        ]

    def start(self, *more):
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *self.command, *more],
            cwd=self.world.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *more):
        return self.world.run(*self.command, *more)

    def steps(self, name):
        """Training steps that a run has logged."""
        path = self.folder / name / "metrics.jsonl"
        if not path.is_file():
            return 0
        return sum('"split": "train"' in line for line in path.read_text(encoding="utf-8").splitlines())

    def kill_training(self, name):
        holder = (self.folder / name / "training.lock").read_text(encoding="utf-8")
        os.kill(int(json.loads(holder)["pid"]), signal.SIGKILL)

    def wait_for(self, happened, process):
        deadline = time.monotonic() + SOON_S
        while not happened():
            assert time.monotonic() < deadline, "it did not happen in time"
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """The study after a driver's death and a second call in which a worker is killed; what that call said is kept."""
    made = Small(world, tmp_path_factory.mktemp("study"))
    first = made.start()
    # An epoch has three steps; the fourth is logged once the first epoch's checkpoint stands.
    made.wait_for(lambda: made.steps("on-seed42") >= 4, first)
    first.kill()
    made.kill_training("on-seed42")  # or it may come to its end before Ray misses the driver
    first.communicate()
    made.steps_at_kill = made.steps("on-seed42")
    second = made.start()
    made.wait_for(lambda: made.steps(KILLED) >= 1, second)
    made.kill_training(KILLED)
    made.stdout, made.stderr = second.communicate(timeout=SOON_S)
    made.returncode = second.returncode
    return made


def states(study):
    return {run["run"].rpartition("/")[2]: run for member in study["members"] for run in member["trainings"]}


def test_a_killed_worker_and_a_broken_member_fail_alone(small):
    (study,) = json.loads(small.stdout)
    assert small.returncode == 3, small.stderr
    found = states(study)
    assert {name: found[name]["state"] for name in TRAININGS} == {
        name: "failed" if name == KILLED or name.startswith("broken") else "done" for name in TRAININGS
    }
    assert "its process died" in found[KILLED]["reason"]
    assert "99" in found["broken-seed42"]["reason"]
    assert "99" in Path(found["broken-seed42"]["log"]).read_text(encoding="utf-8")
    assert f"failed small/{KILLED}: its process died" in small.stderr


def test_a_study_whose_driver_was_killed_goes_on_from_its_checkpoints(small):
    log = (small.folder / "logs" / "on-seed42.log").read_text(encoding="utf-8")
    assert "resuming" in log
    # 24 scene samples in batches of 8, three epochs.
    steps = [json.loads(line) for line in (small.folder / "on-seed42" / "metrics.jsonl").read_text().splitlines()]
    trained = [row["step"] for row in steps if row["split"] == "train"]
    assert trained == list(range(len(trained)))
    assert len(trained) > small.steps_at_kill > 0


def test_all_members_read_one_cache_that_is_not_extracted_again(small, world):
    (study,) = json.loads(small.stdout)
    assert list(study["caches"].values()) == [str(world.cache)]
    (fingerprint,) = study["caches"]
    stamps = [json.loads((small.folder / name / "run.json").read_text()) for name in TRAININGS[:3]]
    assert {stamp["fingerprint"] for stamp in stamps} == {fingerprint}
    assert "extracting" not in small.stderr


def test_the_table_has_means_spreads_and_paired_tests_of_what_the_runs_answered(small):
    (study,) = json.loads(small.stdout)
    on, off, broken = study["members"]
    accuracies = [
        json.loads((small.folder / f"on-seed{seed}" / "metrics.json").read_text())["scene"] for seed in (42, 43)
    ]
    line = on["tasks"]["scene"]
    assert line["by_seed"] == {"42": accuracies[0]["top1"], "43": accuracies[1]["top1"]}
    assert line["mean"] == pytest.approx((accuracies[0]["top1"] + accuracies[1]["top1"]) / 2)
    assert line["against_base"] is None
    against = off["tasks"]["scene"]["against_base"]
    assert against["n"] == accuracies[0]["n"], "only the seed that both have is compared"
    assert against["top1_first"] == accuracies[0]["top1"]
    assert study["floors"]["scene"] == accuracies[0]["floor"]
    assert broken["tasks"] == {}
    assert (on["paper"], off["paper"], broken["paper"]) == (69.2, 58.2, None)


def test_sigterm_ends_it_with_one_line_and_the_state_is_kept(world, tmp_path):
    study = Small(world, tmp_path)
    process = study.start()
    study.wait_for(lambda: study.steps("on-seed42") >= 2, process)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=SOON_S)
    assert process.returncode == 75, said
    assert out == ""
    assert "stopped by SIGTERM; 0 of 6 trainings are done, run the same command again to go on" in said
    assert "Traceback" not in said
    assert "SIGTERM received" not in said, "Ray's answer, before it aborts"
    states = {
        one["state"]
        for member in json.loads((study.folder / "study.json").read_text(encoding="utf-8"))["members"]
        for one in member["trainings"]
    }
    assert states == {"left"}


def test_pages_and_pictures_are_written(small):
    page = (small.folder / "study.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "its process died" in page
    assert (small.folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "majority floor" in (small.folder / "plot.svg").read_text(encoding="utf-8")
    assert "on-seed43" in (small.folder / "report.html").read_text(encoding="utf-8")


def test_failed_members_are_left_alone_until_asked_for(small):
    before = {path: path.stat().st_mtime_ns for path in (small.folder / "logs").iterdir()}
    again = small.run()
    assert again.returncode == 3
    assert "Ray" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (small.folder / "logs").iterdir()} == before
    planned = small.run("--retry-failed", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    counted = [one["state"] for one in json.loads(planned.stdout)["trainings"]]
    assert (counted.count("done"), counted.count("left")) == (3, 3)


def test_another_configuration_under_the_same_name_is_refused(small):
    done = small.run("--set", "train.lr=0.5")
    assert done.returncode == 2
    assert "a run of another configuration has this name: train.lr is" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_features_and_videos_it_says_so_before_any_training(world, tmp_path):
    options = world.options(videos=tmp_path / "none", cache=tmp_path / "cache")
    done = world.run("ablate", "--study", "lambda", *options, "--set", f"run.folder={tmp_path / 'runs'}")
    assert done.returncode == 2
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/*/config.yaml"))
