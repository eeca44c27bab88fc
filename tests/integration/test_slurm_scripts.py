"""The Slurm scripts of the documentation, run by bash with stand-ins for Slurm's, Ray's and the project's programs."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "extraction.md"
# Each writes its name and arguments into a log; srun runs what follows its own options.
PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\n"$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\nn3\\n"; fi',
    "ray": 'if [ "$1" = status ]; then printf "Active:\\n 1 node_a\\n 1 node_b\\n 1 node_c\\n"; fi',
    "pipeline": "exit ${ENDS_WITH:-0}",
}


def script_with(words):
    (found,) = (one for one in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL) if words in one)
    return found


@pytest.fixture
def run(tmp_path):
    for name, body in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/log"\n{body}\n')
        program.chmod(0o755)

    def run(words, **variables):
        (tmp_path / "log").unlink(missing_ok=True)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        done = subprocess.run(
            ["bash", "-c", script_with(words) + "\n"], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        return done.returncode, (tmp_path / "log").read_text().splitlines()

    return run


def test_every_task_of_an_array_extracts_a_shard_of_its_own(run):
    for task in ("1", "8"):
        code, log = run("--array", SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="8", SLURM_ARRAY_JOB_ID="70")
        assert code == 0
        assert log[-1].startswith("pipeline extract --dataset lvu --cache /shared/caches/lvu ")
        assert log[-1].endswith(f"--shard {task}/8")


def test_one_task_alone_is_the_shard_that_it_was(run):
    _, log = run("--array", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="1", SLURM_ARRAY_JOB_ID="70", SHARDS="8")
    assert log[-1].endswith("--shard 3/8")


def test_a_task_that_is_preempted_is_put_back_into_the_queue(run):
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_JOB_ID": "70"}
    assert run("--array", **task, ENDS_WITH="75")[1][-1] == "scontrol requeue 70_3"
    code, log = run("--array", **task, ENDS_WITH="3")
    assert code == 3
    assert not any("requeue" in line for line in log)


def test_a_job_starts_ray_on_each_of_its_nodes_and_extracts_on_the_first(run, tmp_path):
    code, _ = run("ray start", SLURM_JOB_NODELIST="n[1-3]", SLURM_JOB_NUM_NODES="3", SLURM_JOB_ID="70")
    assert code == 0
    expected = {
        "ray start --head --port=6379 --block",
        "srun --nodes=2 --ntasks=2 --exclude=n1 ray start --address=n1:6379 --block",
        "ray start --address=n1:6379 --block",
        "pipeline extract --dataset lvu --cache /shared/caches/lvu --videos /shared/lvu --address auto",
    }
    # The nodes' programs run in the background.
    until = time.monotonic() + 20
    while missing := expected.difference((tmp_path / "log").read_text().splitlines()):
        assert time.monotonic() < until, missing
        time.sleep(0.05)
