"""Who sits where among training processes, and when their dying is no chance any more."""

import pytest

from pipeline.runs.training import Outcome
from stages.cluster.shares import Seats, seats_on
from stages.errors import UserError
from stages.networks.checkpoint import Position
from stages.train.processes import Desk
from stages.train.trainer import Ending


def nodes(*resources, dead=()):
    return [{"Alive": index not in dead, "Resources": given} for index, given in enumerate(resources)]


def test_each_process_has_a_gpu_of_its_own_where_there_are_gpus():
    two = nodes({"CPU": 32.0, "GPU": 4.0}, {"CPU": 32.0, "GPU": 4.0})
    assert seats_on(two, 8) == Seats(processes=8, gpus=1, cores=8, cpus=1.0)
    with pytest.raises(UserError, match="has 4 GPUs, one for each training process; got 8; allowed: 1 to 4"):
        seats_on(nodes({"CPU": 32.0, "GPU": 4.0}, {"CPU": 32.0, "GPU": 4.0}, dead={1}), 8)


def test_without_gpus_they_divide_the_cores_however_few_there_are():
    assert seats_on(nodes({"CPU": 9.0}), 2) == Seats(processes=2, gpus=0, cores=4, cpus=1.0)
    assert seats_on(nodes({"CPU": 1.0}), 4) == Seats(processes=4, gpus=0, cores=1, cpus=0.25)


@pytest.mark.parametrize(
    ("machines", "processes", "share"),
    [
        ([{"CPU": 1.0}, {"CPU": 1.0}], 3, 0.5),  # two thirds of a core each would be too much for the second on one
        ([{"CPU": 4.0}, {"CPU": 1.0}], 5, 1.0),
        ([{"CPU": 4.0}, {"CPU": 1.0}], 6, 0.8),
        ([{"CPU": 1.0}], 3, 0.3333),
        ([{"CPU": 64.0}, {"CPU": 2.0, "GPU": 4.0}], 4, 0.5),  # cores where no GPU is help nobody
    ],
)
def test_all_of_them_have_a_place_at_once_on_the_nodes_as_they_are(machines, processes, share):
    seats = seats_on(nodes(*machines), processes)
    assert seats.cpus == share
    places = sum(
        int(min(node["CPU"] / seats.cpus + 1e-9, node.get("GPU", 0.0) if seats.gpus else processes))
        for node in machines
    )
    assert places >= processes


def test_deaths_are_forgiven_as_long_as_checkpoints_come_on_and_three_times_at_one():
    desk = Desk()
    assert desk.start(0) is None
    for step in (0, 0, 4, 4, 4, 8, 8, 8):
        desk.died(f"RuntimeError: after {step}")
        desk.died("Connection closed by peer")
        assert desk.start(step) is None
    desk.died("RuntimeError: the fourth time")
    assert desk.start(8) == "RuntimeError: the fourth time", "the first of several causes"


def test_of_a_process_that_could_not_say_what_it_died_of_that_is_said():
    desk = Desk()
    causes = [desk.start(0) for _ in range(4)]
    assert causes == [None, None, None, "a process was killed, or ran out of memory"]


def test_what_was_said_is_collected_once_and_in_order():
    desk = Desk()
    desk.say("first")
    desk.say("second")
    assert desk.collect() == ["first", "second"]
    assert desk.collect() == []


@pytest.mark.parametrize("best", [None, Position(epoch=1, step=8, val_top1=0.5, val_loss=1.5)])
def test_an_outcome_is_read_back_as_it_was_sent(best):
    ending = Ending(Position(epoch=2, step=16, target_width=96, best_step=8), best, stopped=False, early=True)
    outcome = Outcome(ending, total_steps=24, trained_count=7)
    assert Outcome.from_json(outcome.to_json()) == outcome
