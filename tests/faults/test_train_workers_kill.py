"""Two training processes under real signals: one is killed, then the command is preempted, then one process goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_world import SIGKILL, SIGTERM, STEPS, end, make, near, rows_of, wait_for_step

EPOCHS = 4


def trainers_of(command, module="pipeline.runs.launched"):
    """Ids of the processes that train for a command, by the module that they run: they descend from it."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if module in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended meanwhile
    return sorted(one for one in found if command in ancestors(one, parents))


def ancestors(pid, parents):
    while pid in parents:
        pid = parents[pid]
        yield pid


@pytest.mark.slow
def test_killed_and_preempted_it_ends_as_if_nobody_had_disturbed_it(tmp_path):
    world = make(tmp_path)
    longer = ("--set", f"train.epochs={EPOCHS}", "--set", "train.keep_checkpoints=1")
    world.train("whole", *longer)
    run, steps = world.run_folder("disturbed"), STEPS // 3 * EPOCHS
    process = world.start(run.name, *longer, "--processes", "2")
    wait_for_step(run, 5, process)
    first = trainers_of(process.pid)
    assert len(first) == 2
    os.kill(first[1], SIGKILL)
    logged = len(rows_of(run))
    wait_for_step(run, max(logged, 12) + 5, process)
    second = trainers_of(process.pid)
    assert len(second) == 2
    assert not set(first) & set(second), "all processes are started again"
    code, told = end(process, SIGTERM)
    assert code == 75, told
    assert "Traceback" not in told
    assert "a training process died; all go on after step" in told
    stopped = len(rows_of(run))
    assert stopped < steps
    assert f"stopped after step {stopped} of {steps}; its state is saved" in told
    assert json.loads((run / "checkpoints" / "index.json").read_text())["last"] == f"step-{stopped:08d}"
    # The rest by one process.
    world.train(run.name, *longer, "--resume")
    assert [row["step"] for row in rows_of(run)] == list(range(steps)), "a step is missing or comes twice"
    near(run, world.run_folder("whole"))


@pytest.mark.slow
def test_torchruns_agent_starts_killed_processes_again_from_the_newest_checkpoint(tmp_path):
    world = make(tmp_path)
    world.train("whole")
    run = world.run_folder("disturbed")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    process = subprocess.Popen(
        [sys.executable, "-m", *torchrun, "-m", "pipeline", "train", *world.options("--name", run.name)],
        cwd=world.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(run, 5, process)
    first = trainers_of(process.pid, "pipeline")
    assert len(first) == 2
    os.kill(first[1], SIGKILL)
    out, printed = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert f"resuming {Path('runs') / run.name} after step" in printed
    assert out.startswith(f"trained {STEPS} steps; best after epoch")
    near(run, world.run_folder("whole"))
