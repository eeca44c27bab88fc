"""`pipeline train --processes 2` on a real Ray: the same batches by two processes are the same training."""

import pytest
import torch

from tests.training_world import STEPS, make, near, rows_of, weights

# AdamW divides by what may be next to nothing.
WEIGHTS = 1e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    world = make(tmp_path_factory.mktemp("training"))
    world.train("one")
    told = world.train("two", "--processes", "2")
    return world.run_folder("one"), world.run_folder("two"), told


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


def test_the_command_tells_what_one_process_would(runs):
    two, told = runs[1], runs[2]
    assert "starting Ray for 2 training processes" in told
    assert told.count("32 training and 8 validation samples") == 1
    assert f"trained {STEPS} steps; best after epoch" in told
    assert not list(two.glob(".ray-train-*")), "Ray Train's own files go"
