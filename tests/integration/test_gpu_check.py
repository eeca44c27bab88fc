"""The check of a GPU, tried at tiny shapes on the CPU: what it needs, and that neither a fault nor the clock costs it
what it has measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import parts as gpu_parts
from benchmarks.gpu import published

ROOT = Path(__file__).parents[2]
WITHOUT = ("ray", "av", "decord", "torchcodec", "zarr", "typer", "rich")
# Runs the program as `python -m benchmarks.gpu_check` does, where none of these can be imported.
BARE = f"""
import importlib.util, runpy, sys
from importlib.abc import MetaPathFinder
def is_absent(name):
    return name.partition(".")[0] in {WITHOUT!r}
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if is_absent(name):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if is_absent(name) else find_spec(name, *package)
sys.meta_path.insert(0, Absent())
runpy.run_module("benchmarks.gpu_check", run_name="__main__", alter_sys=True)
"""


def written(folder):
    (path,) = folder.glob("gpu-check-*.json")
    return json.loads(path.read_text())


def run(folder, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE, "--tiny", "--output", folder, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: part["rows"] for name, part in written(folder)["parts"].items() if part["state"] == "done"}


def test_every_part_runs_without_ray_a_decoder_and_the_command_line(tmp_path):
    parts = [name for name in gpu_check.PARTS if name != "compiled"]
    rows = run(tmp_path, "--parts", *parts)
    assert list(rows) == parts
    assert {row["network"] for row in rows["frozen_networks"]} >= {"vision tower", "teacher"}
    assert all(row["frames_per_s"] > 0 for row in rows["frozen_networks"])
    equality, *forms = rows["clip_form"]
    assert max(equality["level_differences"]) < 1e-5
    assert equality["gradient_difference_largest"] < 1e-4
    assert {(row["pass"], row["precision"]) for row in forms if row["frames"] == published.TINY.frames} == {
        (way, dtype) for way in ("forward", "forward+backward") for dtype in ("torch.float32", "torch.bfloat16")
    }
    assert [row["not_finite"] for row in rows["training_step"]] == [None] * len(rows["training_step"])
    assert all(row["relative_difference"]["total"] < 0.01 for row in rows["losses"])
    assert {row["way"]: row["difference"] < 1e-5 for row in rows["bank_ways"] if "way" in row} == {
        "pages": True,
        "gather": True,
        "flex": True,
    }


@pytest.mark.slow
def test_the_compiled_part_runs(tmp_path):
    rows = run(tmp_path, "--parts", "compiled")["compiled"]
    assert [row["of"] for row in rows] == ["training step", "teacher", "vision tower"]


def failing(_machine):
    yield {"measured": 1}
    raise RuntimeError("a kernel that this GPU lacks")


def endless(_machine):
    yield {"measured": 2}
    while True:
        time.sleep(0.01)


def fine(_machine):
    yield {"measured": 3}


@pytest.fixture
def check(tmp_path, monkeypatch):
    parts = {"failing": (failing, 30), "endless": (endless, 2.1), "fine": (fine, 30), "late": (fine, 30)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    before = signal.signal(signal.SIGALRM, gpu_check._time_is_up)
    yield gpu_check.Check(tmp_path / "gpu-check-now.json", 1000.0, {"started": "now"}, began_s=time.monotonic())
    signal.signal(signal.SIGALRM, before)


def test_a_part_that_fails_or_takes_too_long_keeps_its_rows_and_stops_no_other(check, tmp_path, capsys):
    machine = gpu_parts.Machine(torch.device("cpu"), published.TINY, tiny=True)
    assert not check.run("failing", machine, later_s=1000.0)
    assert written(tmp_path)["parts"]["failing"]["state"] == "failed", "the file is whole after every part"
    assert check.run("endless", machine, later_s=1000.0)
    assert check.run("fine", machine, later_s=0.0)
    check.limit_s = 1.0
    assert check.run("late", machine, later_s=0.0)
    parts = written(tmp_path)["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {
        "failing": "failed",
        "endless": "cut",
        "fine": "done",
        "late": "left out",
    }
    assert [parts[name]["rows"] for name in ("failing", "endless", "fine")] == [
        [{"measured": 1}],
        [{"measured": 2}],
        [{"measured": 3}],
    ]
    assert "in failing" in parts["failing"]["error"]
    assert "RuntimeError: a kernel that this GPU lacks" in parts["failing"]["error"]
    assert "a kernel that this GPU lacks" in capsys.readouterr().err


def test_a_run_that_is_killed_leaves_the_rows_so_far(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_check", "--tiny", "--output", tmp_path, "--parts", "clip_form"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.kill()
    process.wait()
    part = written(tmp_path)["parts"]["clip_form"]
    assert part["state"] == "running"
    assert part["rows"][0]["frames"] == published.TINY.frames


def test_without_a_gpu_it_measures_nothing_at_the_published_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path)])
    assert gpu_check.main() == 0
    assert "no GPU here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
