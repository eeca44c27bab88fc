"""One of N shares of a plan: what it is called, and what is in it."""

import random

import numpy as np
import pytest

from stages.data.frame_plan import FramePlan
from stages.errors import UserError
from stages.shard import Shard


@pytest.mark.parametrize(
    "text", ["0/8", "9/8", "8/0", "0/0", "-1/8", "1", "1/", "/8", "1/8/2", "1.0/8", "a/b", " 1/8", "٣/8"]
)
def test_what_is_no_shard_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"--shard: this is no shard of a plan.*1 <= I <= N") as refused:
        Shard.parse(text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("text", ["1/1", "3/8", "8/8"])
def test_a_shard_is_written_as_it_is_read(text):
    assert str(Shard.parse(text)) == text


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_shards_are_disjoint_and_together_everything_whatever_the_order(count):
    chance = random.Random(count)
    sizes = {f"v{number}": chance.randint(1, 400) for number in range(60)}
    shares = [Shard(index, count).own_keys(sizes) for index in range(1, count + 1)]
    assert sorted(key for share in shares for key in share) == sorted(sizes)
    shuffled = dict(chance.sample(list(sizes.items()), len(sizes)))
    assert [Shard(index, count).own_keys(shuffled) for index in range(1, count + 1)] == shares


def test_shards_have_about_as_many_frames_not_as_many_videos():
    plan = FramePlan(
        {f"short{n}": np.arange(10.0) for n in range(40)} | {f"long{n}": np.arange(200.0) for n in range(2)}
    )
    shards = [plan.of_shard(Shard(index, 4)) for index in range(1, 5)]
    assert [shard.num_frames for shard in shards] == [200, 200, 200, 200]
    assert sorted(shard.num_videos for shard in shards) == [1, 1, 20, 20]
    assert all((shard.times_s[video] == plan.times_s[video]).all() for shard in shards for video in shard.times_s)
