"""Processes under torch's elastic launcher: how their ends are reported, and what each is told of its place."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from pipeline.runs.training import Outcome
from stages.errors import UserError
from stages.networks.checkpoint import Position
from stages.train import processes
from stages.train.launch import run_processes
from stages.train.processes import Place, TrainingProcess, first_host, met, place_in, variables_of_slurm
from stages.train.trainer import Ending

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
SRUN |= {"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_NTASKS": "8"}
WRITES = """\
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
open(sys.argv[1] + os.environ["RANK"], "w").write(json.dumps([os.environ[name] for name in names]))
"""


def run(program, count, tmp_path, *words, look=lambda: None):
    return run_processes(("-c", program, *words), count, tmp_path / "logs", look)


def test_each_process_finds_its_place_in_its_environment(tmp_path, capfd):
    assert run(WRITES, 3, tmp_path, str(tmp_path / "rank-")) is None
    for rank in range(3):
        found = json.loads((tmp_path / f"rank-{rank}").read_text())
        assert found == [str(rank), "3", str(rank), "3", "127.0.0.1"]
    assert capfd.readouterr() == ("", ""), "torch's launcher logs nothing"


def test_one_that_ends_otherwise_ends_all_and_is_named(tmp_path, capfd):
    waits = "import os, time\nif os.environ['RANK'] == '1':\n    os.{}\ntime.sleep(60)"
    began = time.monotonic()
    death = run(waits.format("_exit(3)"), 2, tmp_path)
    assert (str(death), death.was_killed) == ("process 1 ended with exit code 3", False)
    death = run(waits.format("kill(os.getpid(), 9)"), 2, tmp_path)
    assert (str(death), death.was_killed) == ("process 1 was killed by SIGKILL", True)
    assert time.monotonic() - began < 30
    assert capfd.readouterr() == ("", "")


def test_only_the_first_process_is_heard(tmp_path, capfd):
    assert run("import os, sys\nsys.stderr.write(os.environ['RANK'])", 2, tmp_path) is None
    assert capfd.readouterr() == ("", "0")


def test_the_command_looks_up_meanwhile_and_may_leave(tmp_path):
    def look():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(3)", 1, tmp_path, look=look)


def test_a_place_is_read_from_torchs_variables():
    assert place_in({}) is None
    assert place_in({"SLURM_PROCID": "1", "WORLD_SIZE": "2"}) is None
    # Without torchrun nobody knows how many there are on this machine: at least those of lower local ranks.
    assert place_in(TORCH) == Place(rank=5, size=8, local_rank=1, local_size=2, restarts=0)
    given = TORCH | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert place_in(given) == Place(rank=5, size=8, local_rank=1, local_size=4, restarts=2)


def test_variables_that_are_missing_or_no_numbers_are_named():
    without = {name: value for name, value in TORCH.items() if name != "MASTER_PORT"}
    with pytest.raises(UserError, match=r"^RANK is set, but MASTER_PORT is not\. Start .* with torchrun or srun$"):
        place_in(without)
    with pytest.raises(UserError, match=r"no number: .*'first'"):
        place_in(TORCH | {"RANK": "first"})


def test_a_task_of_srun_is_given_torchs_variables():
    assert variables_of_slurm(SRUN) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "24569",
    }
    given = variables_of_slurm(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "1")
    here = variables_of_slurm(SRUN | {"SLURM_STEP_NUM_NODES": "1"})
    assert (here["MASTER_ADDR"], here["LOCAL_WORLD_SIZE"]) == ("127.0.0.1", "8")


@pytest.mark.parametrize("given_by", ["SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU"])
def test_a_task_with_gpus_of_its_own_takes_the_first_of_them(given_by):
    given = variables_of_slurm(SRUN | {given_by: "1"})
    assert (given["RANK"], given["LOCAL_RANK"], given["LOCAL_WORLD_SIZE"]) == ("5", "0", "1")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},  # a batch script
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        SRUN | TORCH,  # torchrun within srun
    ],
)
def test_other_processes_are_no_tasks_of_srun(environment):
    assert variables_of_slurm(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("login1,gpu[03-05]", "login1"),
        ("a[7,9-10]b-ib,c", "a7b-ib"),
    ],
)
def test_the_first_of_slurms_nodes_is_the_master(nodes, first):
    assert first_host(nodes) == first


def process(**changed):
    return TrainingProcess(replace(Place(rank=0, size=4, local_rank=0, local_size=4, restarts=0), **changed), None)


def test_fewer_gpus_than_processes_of_a_machine_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = r"^this machine has 2 GPUs, one for each training process; got '4 processes'; allowed: 1 to 2$"
    with pytest.raises(UserError, match=said):
        process().join()


@pytest.mark.parametrize(("given", "threads"), [(None, 3), ("1", 1)])
def test_processes_of_a_machine_share_its_cores_unless_the_user_says_otherwise(given, threads, tmp_path):
    program = """\
import sys
import torch, torch.distributed as dist
from stages.train import processes
processes.usable_cores = lambda: 6
process = processes.TrainingProcess(processes.Place(0, 1, 0, 2, 0), dist.FileStore(sys.argv[1], 1))
process.join()
print(torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if given is None else {"OMP_NUM_THREADS": given}
    words = [sys.executable, "-c", program, str(tmp_path / "store")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1] == str(threads), done.stderr  # gloo of torch 2.9 prints there, too


def test_of_processes_that_fail_one_goes_on_with_its_error(tmp_path, monkeypatch):
    store = dist.FileStore(str(tmp_path / "store"), -1)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    with pytest.raises(UserError, match="the cause"), met(process().place):
        raise UserError("the cause", exit_code=3)
    with pytest.raises(SystemExit) as ended, met(process().place):
        raise UserError("the cause", exit_code=3)
    assert ended.value.code == 3
    with pytest.raises(SystemExit) as ended, met(process(rank=1).place):
        raise RuntimeError("Connection closed by peer")
    assert ended.value.code == 1


def test_other_code_than_the_first_process_has_is_refused(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), -1)
    store.set("code", "of another version")
    with pytest.raises(UserError, match="a worker would run other code than the command"):
        TrainingProcess(process(rank=1).place, store).require_same_code()


@pytest.mark.parametrize("best", [None, Position(epoch=1, step=8, val_top1=0.5, val_loss=1.5)])
def test_an_outcome_is_read_back_as_it_was_sent(best):
    ending = Ending(Position(epoch=2, step=16, target_width=96, best_step=8), best, stopped=False, early=True)
    outcome = Outcome(ending, total_steps=24, trained_count=7)
    assert Outcome.from_json(outcome.to_json()) == outcome
