"""Which samples a batch holds, in which order, and that worker processes change neither."""

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.settings.config import resolve
from stages.batches.feed import Collate, feed
from stages.batches.order import NEAR_BATCHES, EpochOrder
from stages.batches.windows import Drawn, WindowDataset, widened
from stages.cache import FeatureCache, Fingerprint, MissingFramesError
from stages.data.manifest import Sample
from stages.errors import UserError
from stages.networks.tokens import Tokenizers

CPU = torch.device("cpu")


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


VIDEOS = [f"v{index % 30}" for index in range(150)]  # five samples each


def near(seed=3):
    return EpochOrder(len(VIDEOS), 4, seed, near=VIDEOS)


def test_near_order_keeps_a_videos_samples_within_a_block_and_out_of_the_same_batch():
    first_batch, spread, together = {}, [], 0
    for number, batch in enumerate(near().batches(0)):
        videos = [VIDEOS[index] for index in batch]
        together += len(videos) - len(set(videos))
        for video in videos:
            first_batch.setdefault(video, number)
            spread.append(number - first_batch[video])
    # A video may begin in one block and end in the next.
    assert max(spread) < 2 * NEAR_BATCHES
    assert together == 0
    plain = [VIDEOS[index] for batch in EpochOrder(len(VIDEOS), 4, 3).batches(0) for index in batch]
    assert (
        max(len(plain) - 1 - plain[::-1].index(video) - plain.index(video) for video in set(plain)) > 8 * NEAR_BATCHES
    )


def test_near_order_serves_every_sample_once_and_each_epoch_anew():
    drawn = list(chain.from_iterable(near().batches(0)))
    assert len(drawn) == len(set(drawn)) == 148
    assert near().batches(1) == near().batches(1) != near().batches(0) != near(seed=4).batches(0)


def test_near_order_favours_no_place_in_the_epoch():
    """Over many epochs every sample's mean place is the middle: 37 batches, so 18."""
    places = np.zeros(len(VIDEOS))
    counts = np.zeros(len(VIDEOS))
    for epoch in range(300):
        for number, batch in enumerate(near().batches(epoch)):
            places[batch] += number
            counts[batch] += 1
    deviation = 10.7 / np.sqrt(300)  # of the mean of a uniform place
    assert np.abs(places / counts - 18).max() < 5 * deviation


# --- windows and batches


def test_a_window_holds_the_frames_that_its_sample_names(cache):
    window = windows(cache, [sample(2, start_s=3.0)])[0]
    assert window.features.dtype == torch.float16
    assert window.features[:, 0, 0].tolist() == [203, 204, 205, 206]
    assert window.targets[:, 0].tolist() == [-203, -204, -205, -206]


def test_a_drawn_sample_shows_the_frames_of_its_epoch(cache):
    jittered = Sample(**{**sample(2, num_frames=2).model_dump(), "end_s": 0.3, "jitter": True, "id": "scene:5"})
    dataset = WindowDataset(cache, [jittered], tolerance_s=8.0, with_targets=False)
    asked = [jittered.training_times_s(1, epoch) for epoch in range(4)]
    assert len({tuple(times) for times in asked}) > 1
    seen = [dataset[Drawn(0, 1, epoch)].features for epoch in range(4)]
    plain = dataset[0].features
    expected = [cache.read("v2", times, tolerance_s=8.0).features for times in asked]
    assert all(np.array_equal(window.numpy(), frames) for window, frames in zip(seen, expected, strict=True))
    assert np.array_equal(plain.numpy(), cache.read("v2", jittered.frame_times_s(), tolerance_s=8.0).features)


@pytest.fixture(scope="module", params=["float16", "float32", "bfloat16", "int8"])
def stored(request, tmp_path_factory):
    """A cache of one video in a storage type, channels of very different size."""
    folder = tmp_path_factory.mktemp(request.param)
    made = FeatureCache.create_or_open(folder, Fingerprint(fields={"storage": request.param}))
    random = np.random.default_rng(0)
    features = random.standard_normal((8, 2, 3)).astype(np.float32) * [100, 1, 0.01]
    targets = np.zeros((8, 5), np.float32)
    for video in range(3):
        made.write_video(
            f"v{video}", times_s=np.arange(8.0), features=(features * (video + 1)).astype(np.float32), targets=targets
        )
    return made


def test_features_travel_as_stored_and_are_widened_to_what_the_cache_reads(stored, tokenizers):
    samples = [sample(index) for index in range(3)]
    kind = stored.fingerprint.fields["storage"]
    # The one with scales also takes the way through a worker's shared memory.
    (batch,) = feed(windows(stored, samples), [[2, 0, 1]], tokenizers, workers=int(kind == "int8"))
    assert batch.stored.features.dtype == getattr(torch, kind)
    assert (batch.scales is not None) == (kind == "int8")
    for row, index in enumerate([2, 0, 1]):
        read = torch.from_numpy(stored.read(f"v{index}", samples[index].frame_times_s()).features)
        read = read.view(torch.bfloat16) if read.dtype == torch.uint16 else read
        assert torch.equal(batch.on(torch.device("cpu")).features[row], read)


def test_widening_leaves_floats_alone():
    features = torch.randn(1, 2, 3, 4)
    assert widened(features, None) is features


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_a_batch_is_pinned_as_a_whole(cache, tokenizers):
    (batch,) = feed(windows(cache, [sample(0)]), [[0]], tokenizers, workers=0)
    assert batch.stored.features.is_pinned()
    assert batch.stored.question.ids.is_pinned()


def test_pinning_reaches_every_tensor(cache, tokenizers):
    """What `pin_memory` does to each, with another change in place of the one that needs a GPU."""
    from stages.device import each_tensor

    (batch,) = feed(windows(cache, [sample(0)]), [[0]], tokenizers, workers=0)
    seen = []
    each_tensor(batch, lambda tensor: seen.append(tensor.shape) or tensor)
    assert len(seen) == 2 + 2 + 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("with_targets", [True, False])
def test_a_plain_loader_stacks_the_windows(cache, workers, with_targets):
    """With torch's defaults, so its workers are forked from a process that has read the cache."""
    samples = [sample(index) for index in range(5)]
    dataset = windows(cache, samples, with_targets=with_targets)
    assert dataset[0].features.shape == (4, 2, 3)
    batches = list(DataLoader(dataset, batch_size=2, num_workers=workers))
    assert [one.id for batch in batches for one in batch.samples] == [one.id for one in samples]
    assert [batch.features.shape for batch in batches] == [(2, 4, 2, 3), (2, 4, 2, 3), (1, 4, 2, 3)]
    assert torch.equal(torch.cat([batch.features for batch in batches]), torch.stack([one.features for one in dataset]))
    assert [batch.targets is not None for batch in batches] == [with_targets] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_our_collation_gives_batches_with_tokens(cache, tokenizers, workers):
    dataset = windows(cache, [sample(index) for index in range(4)])
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=Collate(tokenizers))
    (batch,) = loader
    (fed,) = feed(dataset, [range(4)], tokenizers, workers=0)
    assert torch.equal(batch.on(CPU).features, fed.on(CPU).features)
    assert torch.equal(batch.on(CPU).question.ids, fed.on(CPU).question.ids)


def test_a_plain_loader_keeps_what_is_stored(stored):
    dataset = windows(stored, [sample(index) for index in range(3)])
    (batch,) = DataLoader(dataset, batch_size=3)
    assert batch.features.dtype == getattr(torch, stored.fingerprint.fields["storage"])
    for row in range(3):
        read = torch.from_numpy(stored.read(f"v{row}", dataset.samples[row].frame_times_s()).features)
        read = read.view(torch.bfloat16) if read.dtype == torch.uint16 else read
        assert torch.equal(widened(batch.features, batch.scales)[row], read)


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
        assert batch.on(CPU).features.shape == (2, 4, 2, 3)
        assert batch.on(CPU).features[:, 0, 0, 0].tolist() == first
        assert batch.on(CPU).targets[:, 0, 0].tolist() == [-value for value in first]
        texts = tokenizers.qformer.batch_decode(batch.on(CPU).question.ids, skip_special_tokens=True)
        asked = [samples[index] for index in indices]
        assert [text.strip() for text in texts] == [one.prompt.replace("{}", one.question) for one in asked]


def test_a_batch_without_targets_has_none(cache, tokenizers):
    (batch,) = feed(windows(cache, [sample(0)], with_targets=False), [[0]], tokenizers, workers=0)
    assert batch.on(CPU).targets is None
    assert batch.on(CPU).answer.ids.shape[0] == 1
