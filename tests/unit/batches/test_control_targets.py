"""The control that gives every frame another video's y*."""

import numpy as np
import pytest

from stages.batches.control_targets import ShuffledTargets
from stages.batches.windows import WindowDataset
from stages.cache import FeatureCache, Fingerprint
from stages.data.manifest import Sample
from stages.errors import UserError

FRAMES = {"a": 4, "b": 6, "c": 3, "d": 6}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Targets say which video and which frame they are of, features too."""
    made = FeatureCache.create_or_open(tmp_path_factory.mktemp("cache"), Fingerprint(fields={"storage": "float16"}))
    for number, (video, count) in enumerate(FRAMES.items()):
        values = 100.0 * number + np.arange(count)
        made.write_video(
            video,
            times_s=0.5 * np.arange(count),
            features=np.broadcast_to(values[:, None, None], (count, 2, 3)).astype(np.float16),
            targets=np.broadcast_to(values[:, None], (count, 5)).astype(np.float32),
        )
    return made


def lent(control, video):
    """Which video's which frames this one's are given."""
    values = control.read(video, 0.5 * np.arange(FRAMES[video]))[:, 0]
    (lender,) = set((values // 100).astype(int))
    return list(FRAMES)[lender], (values % 100).astype(int).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_no_video_gets_its_own_and_each_lends_once(cache, seed):
    control = ShuffledTargets(cache, FRAMES, seed=seed)
    lenders = {video: lent(control, video)[0] for video in FRAMES}
    assert all(video != lender for video, lender in lenders.items())
    assert sorted(lenders.values()) == sorted(FRAMES)


@pytest.mark.parametrize("seed", range(8))
def test_all_of_a_videos_frames_are_lent_before_one_is_lent_again(cache, seed):
    control = ShuffledTargets(cache, FRAMES, seed=seed)
    for video, count in FRAMES.items():
        lender, frames = lent(control, video)
        assert len(set(frames)) == min(count, FRAMES[lender])


def test_the_frames_are_in_another_order(cache):
    orders = [lent(ShuffledTargets(cache, ["b", "d"], seed=seed), "b")[1] for seed in range(4)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert any(order != list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_seed_gives_a_frame_the_same_in_every_window_and_epoch(cache):
    control, again = (ShuffledTargets(cache, FRAMES, seed=3) for _ in range(2))
    whole = control.read("b", 0.5 * np.arange(6))
    assert np.array_equal(again.read("b", np.array([2.0, 0.5])), whole[[4, 1]])


def test_windows_keep_their_features(cache):
    sample = Sample(id="s", video="b", task="t", question="q", answer="x", split="train", times_s=(0.0, 0.5, 1.0))
    control = ShuffledTargets(cache, FRAMES, seed=0)
    plain, shuffled = (
        WindowDataset(cache, [sample], tolerance_s=1e-3, with_targets=True, control=given)[0]
        for given in (None, control)
    )
    assert plain.features.equal(shuffled.features)
    assert plain.targets.shape == shuffled.targets.shape
    assert not plain.targets.equal(shuffled.targets)
    assert np.array_equal(shuffled.targets.numpy(), control.read("b", np.array([0.0, 0.5, 1.0])))


def test_one_video_has_nobody_to_borrow_from(cache):
    with pytest.raises(UserError, match="the training split has one"):
        ShuffledTargets(cache, ["a", "a"], seed=0)
