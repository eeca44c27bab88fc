"""The learning rate of each step against values worked out by hand."""

import math
from itertools import chain

import pytest

from stages.config import TrainConfig
from stages.train.schedule import learning_rate


def rates(config, steps_per_epoch):
    """The rate of every step of a training, [epochs][steps]."""
    return [
        [learning_rate(config, epoch=epoch, step_in_epoch=step, steps_per_epoch=steps_per_epoch) for step in steps]
        for epoch, steps in enumerate([range(steps_per_epoch)] * config.epochs)
    ]


# --- MA-LMM's schedule, the default


def test_relationship_with_four_steps_an_epoch_hardly_warms_up_and_then_jumps():
    """MA-LMM:lavis/common/optims.py:77-103: the warm-up epoch peaks at 3e-7, then comes 9.9e-5."""
    found = rates(TrainConfig(), 4)
    # 1e-8 + (1e-4 - 1e-8) * step / 1000
    assert found[0] == pytest.approx([1e-8, 1.0999e-7, 2.0998e-7, 3.0997e-7], rel=1e-9)
    # 1e-4 * (1 + cos(pi / 20)) / 2, with cos(9 degrees) = 0.98768834
    assert found[1] == pytest.approx([9.9384417e-5] * 4, rel=1e-7)


def test_from_epoch_one_on_the_rate_falls_once_an_epoch_and_never_within_one():
    found = rates(TrainConfig(), 100)
    assert all(len(set(epoch)) == 1 for epoch in found[1:])
    assert found[10][0] == pytest.approx(5e-5)  # half way, cos(90 degrees) = 0
    # 1e-4 * (1 + cos(171 degrees)) / 2
    assert found[19][0] == pytest.approx(6.155830e-7, rel=1e-6)


def test_a_long_first_epoch_reaches_the_peak_and_stays_there():
    found = rates(TrainConfig(epochs=2), 1500)[0]
    assert found[500] == pytest.approx(1e-8 + 0.5 * (1e-4 - 1e-8))
    assert found[999] < 1e-4
    assert found[1000:] == [1e-4] * 500


def test_the_cosine_ends_at_the_lowest_rate_and_not_at_zero():
    config = TrainConfig(epochs=2, min_lr=2e-5)
    assert learning_rate(config, epoch=1, step_in_epoch=0, steps_per_epoch=4) == pytest.approx(6e-5)


# --- warm-up and cosine per step


def test_the_cosine_schedule_warms_up_over_a_twentieth_of_all_steps_and_ends_near_zero():
    config = TrainConfig(schedule="cosine", epochs=10, lr=1e-3, warmup_steps=1000, warmup_start_lr=0.0)
    found = list(chain.from_iterable(rates(config, 10)))  # 100 steps, of which 5 warm up
    assert found[:6] == pytest.approx([0.0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    # 95 steps of cosine: step 5 + 38 lies at 2/5 of it, cos(72 degrees) = 0.30901699
    assert found[43] == pytest.approx(1e-3 * (1 + 0.30901699) / 2, rel=1e-7)
    assert found[99] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 94 / 95)) / 2)
    assert found[5:] == sorted(found[5:], reverse=True)
    assert len(set(found[5:])) == 95


def test_a_short_warm_up_is_taken_as_it_is():
    config = TrainConfig(schedule="cosine", epochs=10, lr=1.0, warmup_steps=2, warmup_start_lr=0.0)
    assert rates(config, 10)[0][:3] == pytest.approx([0.0, 0.5, 1.0])


def test_without_warm_up_training_starts_at_the_peak():
    for schedule in ("cosine", "ma_lmm"):
        config = TrainConfig(schedule=schedule, epochs=4, warmup_steps=0, warmup_start_lr=0.0)
        first = learning_rate(config, epoch=0, step_in_epoch=1, steps_per_epoch=8)
        assert first == pytest.approx(1e-4, rel=0.01), schedule


def test_one_single_step_has_a_rate():
    config = TrainConfig(schedule="cosine", epochs=1, warmup_steps=100, warmup_start_lr=1e-8)
    assert learning_rate(config, epoch=0, step_in_epoch=0, steps_per_epoch=1) == 1e-8
