"""Which samples a batch holds, in which order, and that worker processes change neither."""

from itertools import chain

import numpy as np
import pytest
import torch

from pipeline.config import resolve
from stages.cache import FeatureCache, Fingerprint, MissingFramesError
from stages.errors import UserError
from stages.manifest import Sample
from stages.tokens import Tokenizers
from stages.windows import EpochOrder, WindowDataset, feed


def sample(index, *, num_frames=4, start_s=0.0):
    return Sample(
        id=f"scene:{index}",
        video=f"v{index % 3}",
        task="scene",
        question=f"what is scene {index}?",
        answer="office",
        split="train",
        start_s=start_s,
        end_s=start_s + num_frames - 1,
        num_frames=num_frames,
        index_fps=10.0,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Three videos whose features say which video and which second they are of."""
    made = FeatureCache.create_or_open(tmp_path_factory.mktemp("cache"), Fingerprint(fields={"storage": "float16"}))
    for video in range(3):
        times_s = np.arange(8.0)
        values = 100 * video + times_s
        made.write_video(
            f"v{video}",
            times_s=times_s,
            features=np.broadcast_to(values[:, None, None], (8, 2, 3)).astype(np.float16),
            targets=np.broadcast_to(-values[:, None], (8, 5)).astype(np.float32),
        )
    return made


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizers.load(resolve(preset="tiny").config)


def windows(cache, samples, *, with_targets=True):
    return WindowDataset(cache, samples, tolerance_s=1e-3, with_targets=with_targets)


# --- the order of an epoch


def test_one_seed_and_epoch_give_one_order():
    assert EpochOrder(50, 8, seed=3).batches(2) == EpochOrder(50, 8, seed=3).batches(2)


def test_another_epoch_or_seed_gives_another_order():
    order = EpochOrder(50, 8, seed=3)
    orders = [order.batches(0), order.batches(1), order.batches(2), EpochOrder(50, 8, seed=4).batches(0)]
    assert len({str(batches) for batches in orders}) == len(orders)


def test_an_epoch_can_be_drawn_without_those_before_it():
    """Resuming at epoch 5 sees what an undisturbed training sees there."""
    whole = EpochOrder(20, 4, seed=0)
    for epoch in range(5):
        whole.batches(epoch)
    assert whole.batches(5) == EpochOrder(20, 4, seed=0).batches(5)


@pytest.mark.parametrize(("length", "batch_size", "sizes"), [(12, 4, [4] * 3), (50, 8, [8] * 6), (9, 8, [8])])
def test_nothing_comes_twice_and_an_incomplete_batch_is_dropped(length, batch_size, sizes):
    order = EpochOrder(length, batch_size, seed=0)
    batches = order.batches(0)
    assert [len(batch) for batch in batches] == sizes
    assert len(batches) == order.num_batches
    drawn = list(chain.from_iterable(batches))
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(length))


def test_what_one_epoch_drops_another_serves():
    order = EpochOrder(9, 8, seed=0)
    dropped = {(set(range(9)) - set(*order.batches(epoch))).pop() for epoch in range(40)}
    assert len(dropped) > 4


def test_fewer_samples_than_a_batch_make_one_small_batch():
    order = EpochOrder(3, 8, seed=0)
    assert order.num_batches == 1
    assert [sorted(batch) for batch in order.batches(0)] == [[0, 1, 2]]


# --- windows and batches


def test_a_window_holds_the_frames_that_its_sample_names(cache):
    window = windows(cache, [sample(2, start_s=3.0)])[0]
    assert window.features.dtype == torch.float16
    assert window.features[:, 0, 0].tolist() == [203, 204, 205, 206]
    assert window.targets[:, 0].tolist() == [-203, -204, -205, -206]


def test_targets_are_left_out_unless_asked_for(cache):
    assert windows(cache, [sample(0)], with_targets=False)[0].targets is None


def test_samples_with_unequal_frame_counts_are_refused(cache):
    samples = [sample(0), sample(1), sample(2, num_frames=3)]
    with pytest.raises(UserError, match=r"different numbers of frames \[3, 4\]; first at sample 'scene:2'"):
        windows(cache, samples)


def test_a_frame_that_is_not_cached_is_an_error_and_not_a_gap(cache):
    with pytest.raises(MissingFramesError, match="no cached frame within"):
        windows(cache, [sample(0, start_s=6.0)])[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_asked_for_whatever_the_workers(cache, tokenizers, workers):
    """More batches than the workers hold at once; neighbours come from different workers."""
    samples = [sample(index) for index in range(11)]
    asked = [[10, 0], [3, 3], [1, 9], [7, 2], [5, 8], [6, 4], [0, 1], [2, 10]]
    batches = list(feed(windows(cache, samples), asked, tokenizers, workers=workers))
    served = [[int(one.id.partition(":")[2]) for one in batch.samples] for batch in batches]
    assert served == asked
    for batch, indices in zip(batches, asked, strict=True):
        first = [100 * (index % 3) for index in indices]
        assert batch.clips.features.shape == (2, 4, 2, 3)
        assert batch.clips.features[:, 0, 0, 0].tolist() == first
        assert batch.clips.targets[:, 0, 0].tolist() == [-value for value in first]
        texts = tokenizers.qformer.batch_decode(batch.clips.question.ids, skip_special_tokens=True)
        assert [text.strip() for text in texts] == [samples[index].prompt_text for index in indices]


def test_a_batch_without_targets_has_none(cache, tokenizers):
    (batch,) = feed(windows(cache, [sample(0)], with_targets=False), [[0]], tokenizers, workers=0)
    assert batch.clips.targets is None
    assert batch.clips.answer.ids.shape[0] == 1
