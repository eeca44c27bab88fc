"""Two processes, however they are started, are the same training as one: `--processes`, `torchrun`, `srun`."""

import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.training_world import STEPS, World, make, near, rows_of, weights

DOCS = Path(__file__).parents[2] / "docs" / "training.md"

# AdamW divides by what may be next to nothing.
WEIGHTS = 1e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    world = make(tmp_path_factory.mktemp("training"))
    world.train("one")
    printed = world.train("two", "--processes", "2")
    return world.run_folder("one"), world.run_folder("two"), printed


def test_losses_alignment_and_validation_of_every_step_are_those_of_one_process(runs):
    one, two, _ = runs
    near(two, one)
    assert [row["step"] for row in rows_of(two)] == list(range(STEPS)), "each step is logged once, by one process"
    assert {"loss", "kd_loss", "cosine/3", "weight/5", "target_to_mean"} <= rows_of(two)[0].keys()


def test_the_weights_end_where_those_of_one_process_do_and_the_running_mean_is_the_very_same(runs):
    mine, theirs = (weights(run) for run in runs[1::-1])
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        # The bias of a key moves no probability: its gradient is rounding, which AdamW makes steps of.
        if name[0] == "model" and "key.bias" not in name[1]:
            torch.testing.assert_close(
                mine[name], value, rtol=WEIGHTS, atol=WEIGHTS, msg=lambda text, n=name: f"{n} {text}"
            )
    for name in ("alignment.target_mean", "alignment.targets_seen"):
        assert torch.equal(mine["model", name], theirs["model", name])


def test_the_command_prints_what_one_process_would(runs):
    _, _, printed = runs
    assert "starting 2 training processes" in printed
    assert printed.count("32 training and 8 validation samples") == 1
    assert printed.count(f"trained {STEPS} steps; best after epoch") == 1


class Slurm:
    """Stands in for Slurm's commands: runs the scripts of docs/training.md as two nodes or tasks on this machine."""

    SRUN = """\
[ "$1" = --kill-on-bad-exit ] && shift
status=0
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=$task SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=$NODES "$@" &
    tasks="$tasks $!"
done
for task in $tasks; do wait $task || status=$?; done
exit $status
"""

    def __init__(self, world):
        self.world, self.bin = world, world.folder / "bin"
        self.bin.mkdir()
        (self.world.folder / "scratch").mkdir()
        python = f'exec "{sys.executable}" -m'
        self.write("srun", self.SRUN)
        self.write("scontrol", "echo 127.0.0.1\n")
        self.write("torchrun", f'{python} torch.distributed.run "$@"\n')
        self.write("pipeline", f'{python} pipeline "$@"\n')

    def write(self, name, text):
        (self.bin / name).write_text(f"#!/bin/bash\n{text}", encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def run(self, script, name, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        options = shlex.join(self.world.options("--name", name))
        for word, instead in (
            ("--dataset lvu --task relationship --name mine", options),
            ("29500", port),
            ("runs/mine", f"runs/{name}"),
        ):
            script = script.replace(word, instead)
        given = {"SLURM_JOB_ID": port, "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "gpu[1-2]", "MASTER_PORT": port}
        given |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "TMPDIR": str(self.world.folder / "scratch")}
        return subprocess.run(
            ["bash", "-c", script],
            cwd=self.world.folder,
            env={**os.environ, **given, **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


@pytest.fixture(scope="module")
def slurm(runs):
    return Slurm(World(runs[0].parents[1]))


def scripts():
    """The scripts of "Several GPUs", in their order: with torchrun, and without."""
    section = DOCS.read_text(encoding="utf-8").split("## Several GPUs")[1].split("\n## ")[0]
    found = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    return [textwrap.dedent(one) for one in found]


@pytest.mark.slow
def test_the_slurm_script_with_torchrun_trains_the_same_on_two_nodes_of_one_machine(runs, slurm):
    done = slurm.run(scripts()[0], "nodes", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1")
    assert done.returncode == 0, done.stderr
    near(runs[0].parent / "nodes", runs[1])
    assert done.stdout.count(f"trained {STEPS} steps") == 1
    assert done.stderr.count("32 training and 8 validation samples") == 1
    again = slurm.run(scripts()[0], "nodes", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1")
    assert again.returncode == 0, again.stderr
    assert f"after step {STEPS} of {STEPS}" in again.stderr, "the second time it goes on with its run"


@pytest.mark.slow
def test_the_slurm_script_without_torchrun_trains_the_same_and_one_process_refuses(runs, slurm):
    done = slurm.run(scripts()[1], "tasks", SLURM_CPUS_PER_TASK="1", NODES="1")
    assert done.returncode == 0, done.stderr
    near(runs[0].parent / "tasks", runs[1])
    assert done.stdout.count(f"trained {STEPS} steps") == 1
    refused = slurm.run("srun pipeline train --dataset lvu --task relationship --name mine", "tasks", NODES="1")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_processes_that_always_die_are_started_again_three_times(slurm, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'pipeline.runs.launched' in sys.orig_argv:\n    os.kill(os.getpid(), 9)\n", encoding="utf-8"
    )
    words = "pipeline train --dataset lvu --task relationship --name mine --processes 2"
    done = slurm.run(words, "dying", PYTHONPATH=str(tmp_path))
    cause = r"after step 0: process [01] was killed by SIGKILL"
    assert done.returncode == 1
    assert len(re.findall(f"a training process died; all go on {cause}", done.stderr)) == 3
    assert re.search(
        f"error: the training processes died 4 times; the last time {cause}. Go on by the same command once that is",
        done.stderr,
    )
    assert "Traceback" not in done.stderr
    assert not list((slurm.world.folder / "scratch").glob("pipeline-train-*")), "the command's folder goes"
