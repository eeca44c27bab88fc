"""Training under real signals at random steps: resumed, it ends bit for bit as if nothing had happened.

`TRAIN_KILLS=10` kills one run ten times at random steps, too.
"""

import json
import os
import random
import time

import pytest
import torch

from tests.training_world import SIGINT, SIGKILL, SIGTERM, STEPS, end, make, numbers, rows_of, wait_for_step, weights

KILLS = int(os.environ.get("TRAIN_KILLS", "0"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def whole(world):
    """The run that nobody disturbs, and what it told."""
    told = world.train("whole")
    return world.run_folder("whole"), told


def same(run, undisturbed):
    assert numbers(run) == numbers(undisturbed)
    assert [row["step"] for row in rows_of(run)] == list(range(STEPS)), "a step is missing or comes twice"
    mine, theirs = weights(run), weights(undisturbed)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    index, other = (json.loads((folder / "checkpoints" / "index.json").read_text()) for folder in (run, undisturbed))
    assert index == other


def preempt(world, run):
    """Readers in processes of their own get the signal, too, as a scheduler sends it to all."""
    process = world.start(run.name, "--set", "train.loader_workers=1", "--set", "train.save_every_steps=1000")
    wait_for_step(run, 2, process)
    for reader in children_of(process.pid):
        os.kill(reader, SIGTERM)
    code, told = end(process, SIGTERM)
    assert code == 75, told
    assert "Traceback" not in told
    steps = len(rows_of(run))
    assert f"stopped after step {steps} of {STEPS}; its state is saved; go on by the same command and --resume" in told
    assert (run / "checkpoints" / f"step-{steps:08d}").is_dir(), "not even one step is lost"


def test_preempted_while_it_loads_it_says_so_and_leaves_nothing(world):
    run = world.run_folder("early")
    process = world.start(run.name)
    while "took" not in process.stderr.readline():
        assert process.poll() is None
    code, told = end(process, SIGTERM)
    assert code == 75
    assert told.endswith("stopped by SIGTERM before a first step; go on by the same command\n")
    assert not run.exists()


def kill(world, run, steps, chance):
    """SIGKILL so many steps further on."""
    steps_before = len(rows_of(run))
    process = world.start(run.name, *(["--resume"] if (run / "config.yaml").exists() else []))
    wait_for_step(run, min(STEPS - 1, steps_before + steps), process)
    time.sleep(chance.random() * 0.15)
    code, told = end(process, SIGKILL)
    assert code in (-SIGKILL, 0), told
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')  # a kill may leave half a line


def interrupt(world, run):
    steps_before = len(rows_of(run))
    process = world.start(run.name, "--resume")
    wait_for_step(run, steps_before + 3, process)
    code, told = end(process, SIGINT)
    assert code == 130
    assert "Traceback" not in told
    assert "go on by the same command and --resume" in told


def test_preempted_killed_interrupted_and_with_its_last_checkpoint_cut_it_is_the_undisturbed_run(world, whole):
    """How it is computed may change from call to call: readers, and after how many steps it is saved."""
    undisturbed, _ = whole
    run = world.run_folder("disturbed")
    preempt(world, run)
    kill(world, run, 5, random.Random(3))
    interrupt(world, run)
    file = max((run / "checkpoints").glob("step-*")) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    told = world.train(run.name, "--resume")
    assert f"warning: {file.relative_to(world.folder)}: checkpoint file is damaged. Going back" in told
    assert f"of {STEPS}\n" in told[told.index("resuming runs/disturbed after step ") :]
    same(run, undisturbed)


@pytest.mark.skipif(not KILLS, reason="only with TRAIN_KILLS")
def test_killed_many_times_at_random_steps_it_is_the_undisturbed_run(world, whole):
    undisturbed, _ = whole
    chance = random.Random(5)
    run = world.run_folder("killed")
    for _ in range(KILLS):
        kill(world, run, chance.randint(0, max(1, 2 * STEPS // KILLS)), chance)
    world.train(run.name, "--resume")
    same(run, undisturbed)


def test_a_label_that_only_other_splits_have_is_named(whole):
    _, told = whole
    assert (
        "warning: no training sample of task 'scene' has the answer 'prison', which 2 of its other samples ask for"
    ) in " ".join(told.split())


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
        return [int(child) for child in file.read().split()]
