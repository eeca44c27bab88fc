"""bfloat16 and int8 in the cache: how far a stored feature may be off, and what adding frames may cost."""

import numpy as np
import pytest
import torch
import zarr

from stages.batches.windows import WindowDataset, widened
from stages.cache import CacheWriteError, FeatureCache, Fingerprint, storage_type, widen
from stages.data.manifest import Sample
from tests.cached import records_of

# Of 8 channels the first is an outlier, as vision transformers have them: 200 times the others.
CHANNELS = np.array([200.0, *[1.0] * 6, 0.01])
# Reading int8 gives bfloat16.
ROUNDING = 2.0**-8


def make(root, storage):
    return FeatureCache.create_or_open(root, Fingerprint(fields={"storage": storage}))


def features_of(num_frames, seed=0, scale=1.0):
    drawn = np.random.default_rng(seed).standard_normal((num_frames, 5, len(CHANNELS)))
    return (scale * drawn * CHANNELS).astype(np.float32)


def write(cache, times_s, features, *, merge=False):
    times_s = np.asarray(times_s, dtype=np.float64)
    targets = np.zeros((len(times_s), 4), np.float32) + times_s[:, None].astype(np.float32)
    return cache.write_video("v", times_s=times_s, features=features, targets=targets, merge=merge)


def steps_of(features):
    """What int8 promises: a channel's largest magnitude in the video, over 127."""
    return np.abs(features).max(axis=(0, 1)) / 127


def stored_scales(cache):
    record = records_of(cache)[0]
    return zarr.open_group(str(cache.root / "videos" / record.group), mode="r")["scales"][:]


# --- bfloat16


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_bfloat16_rounds_as_torch_does(tmp_path, dtype):
    cache = make(tmp_path, "bfloat16")
    features = features_of(23).astype(dtype)
    features[0, 0] = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, -(2.0**-14), 6e-8, 1.00390625, 60000]  # ties and small ones
    write(cache, np.arange(23), features)
    bits = cache.read("v", np.arange(23)).features
    assert bits.dtype == np.uint16
    expected = torch.from_numpy(features.copy()).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(bits).view(torch.int16), expected.view(torch.int16))
    np.testing.assert_array_equal(widen(bits), expected.float().numpy())


@pytest.mark.parametrize(("value", "refused"), [(3.38e38, False), (3.395e38, True), (-3.4e38, True), (np.nan, True)])
def test_what_would_become_infinite_in_bfloat16_is_refused(tmp_path, value, refused):
    cache = make(tmp_path, "bfloat16")
    features = features_of(3)
    features[1, 2, 3] = value
    if refused:
        with pytest.raises(CacheWriteError, match=r"features of the frame at 1\.000000 s hold"):
            write(cache, [0, 1, 2], features)
    else:
        write(cache, [0, 1, 2], features)
        assert np.isfinite(widen(cache.read("v", [1.0]).features)).all()


# --- int8


def test_int8_is_off_by_half_a_step_of_its_channel_at_most(tmp_path):
    cache = make(tmp_path, "int8")
    features = features_of(37)
    features[:, :, 3] = 0.0
    write(cache, np.arange(37), features)
    read = widen(cache.read("v", np.arange(37)).features)
    error = np.abs(read.astype(np.float64) - features)
    assert (error <= 0.5 * steps_of(features) * 1.001 + np.abs(features) * ROUNDING).all()
    assert (read[:, :, 3] == 0).all()
    np.testing.assert_array_equal(widen(cache.read("v", [30.0, 2.0, 2.0]).features), read[[30, 2, 2]])


def test_outlier_channels_cost_the_others_nothing(tmp_path):
    """With one scale per token instead, the ordinary channels are off by more than half."""
    cache = make(tmp_path, "int8")
    features = features_of(30)
    write(cache, np.arange(30), features)
    read = widen(cache.read("v", np.arange(30)).features)
    for channel in range(len(CHANNELS)):
        off = np.linalg.norm(read[..., channel] - features[..., channel]) / np.linalg.norm(features[..., channel])
        assert off < 0.01
    per_token = np.abs(features).max(axis=2, keepdims=True) / 127
    wrong = np.rint(features / per_token) * per_token
    assert np.linalg.norm((wrong - features)[..., 1:7]) / np.linalg.norm(features[..., 1:7]) > 0.3


def test_int8_is_stored_as_plain_zarr_with_its_scales_and_half_the_bytes(tmp_path):
    features = features_of(40)
    record = write(make(tmp_path / "int8", "int8"), np.arange(40), features)
    group = zarr.open_group(str(tmp_path / "int8" / "videos" / record.group), mode="r")
    assert sorted(group.array_keys()) == ["features", "scales", "targets", "times_s"]
    assert (group["features"].dtype, group["features"].fill_value, group["features"].chunks) == (
        np.int8,
        -128,
        (10, 5, 8),
    )
    np.testing.assert_allclose(group["scales"][:], steps_of(features), rtol=1e-6)
    assert group["features"][:].min() >= -127
    half = write(make(tmp_path / "float16", "float16"), np.arange(40), features)
    assert record.arrays["features"].num_bytes * 2 == half.arrays["features"].num_bytes


@pytest.mark.parametrize("value", [3.395e38, -3.4e38, np.inf, np.nan])
def test_int8_refuses_what_reading_could_not_give_back(tmp_path, value):
    cache = make(tmp_path, "int8")
    features = features_of(3)
    features[2, 0, 0] = value
    with pytest.raises(CacheWriteError, match=r"features of the frame at 2\.000000 s hold"):
        write(cache, [0, 1, 2], features)


def test_int8_of_the_largest_and_of_tiny_numbers_comes_back_finite(tmp_path):
    cache = make(tmp_path, "int8")
    features = np.zeros((1, 1, 3), np.float32)
    features[0, 0] = [3.38e38, 1e-30, 1e-44]
    write(cache, [0], features)
    read = widen(cache.read("v", [0.0]).features)[0, 0]
    np.testing.assert_allclose(read[:2], [3.38e38, 1e-30], rtol=0.05)
    assert read[2] == 0


# --- adding frames


def test_added_frames_that_fit_the_scales_leave_every_stored_number_alone(tmp_path):
    cache = make(tmp_path, "int8")
    odd, even = features_of(12, seed=1), features_of(12, seed=2, scale=0.2)
    write(cache, np.arange(1, 24, 2), odd)
    before, scales = cache.read("v", np.arange(1, 24, 2)).features, stored_scales(cache)
    write(cache, np.arange(0, 24, 2), even, merge=True)
    np.testing.assert_array_equal(stored_scales(cache), scales)
    np.testing.assert_array_equal(cache.read("v", np.arange(1, 24, 2)).features, before)
    after = cache.read("v", np.arange(0, 24, 2))
    assert (np.abs(widen(after.features) - even) <= 0.51 * scales + np.abs(even) * ROUNDING).all()
    np.testing.assert_array_equal(after.targets[:, 0], np.arange(0, 24, 2))
    assert cache.verify("v").ok


def test_old_frames_are_rounded_again_only_in_channels_that_grew_and_stay_within_a_step(tmp_path):
    cache = make(tmp_path, "int8")
    old, new = features_of(10, seed=1), features_of(10, seed=2, scale=0.2)
    new[:, :, 2] *= 40
    write(cache, np.arange(10), old)
    before = widen(cache.read("v", np.arange(10)).features)
    write(cache, np.arange(10, 20), new, merge=True)
    read = widen(cache.read("v", np.arange(20)).features)
    others = [0, 1, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(read[:10][..., others], before[..., others])
    assert (read[:10, :, 2] != before[..., 2]).any()
    steps = steps_of(np.concatenate([old, new]))
    assert (np.abs(read[:10] - old) <= steps * 1.01 + np.abs(old) * ROUNDING).all()
    assert (np.abs(read[10:] - new) <= 0.51 * steps + np.abs(new) * ROUNDING).all()


def test_seven_tasks_that_each_add_larger_frames_cost_half_a_step_each_at_most(tmp_path):
    cache = make(tmp_path, "int8")
    parts = [features_of(4, seed=task, scale=1.1**task) for task in range(7)]
    for task, part in enumerate(parts):
        write(cache, 4 * task + np.arange(4), part, merge=True)
    whole = np.concatenate(parts)
    read = widen(cache.read("v", np.arange(28)).features)
    assert (np.abs(read - whole) <= 3.5 * steps_of(whole) + np.abs(whole) * ROUNDING).all()
    ordinary = slice(1, 7)
    off = np.linalg.norm((read - whole)[:4][..., ordinary]) / np.linalg.norm(whole[:4][..., ordinary])
    assert off < 0.03


@pytest.mark.parametrize("storage", ["float16", "float32", "bfloat16"])
def test_floats_that_are_kept_do_not_change_when_frames_are_added(tmp_path, storage):
    cache = make(tmp_path, storage)
    write(cache, [1, 3], features_of(2, seed=1))
    before = cache.read("v", [1.0, 3.0]).features
    write(cache, [0, 2, 4], features_of(3, seed=2), merge=True)
    np.testing.assert_array_equal(cache.read("v", [1.0, 3.0]).features, before)
    direct = storage_type(storage).encode(features_of(3, seed=2), video="v", times_s=np.arange(3.0))["features"]
    np.testing.assert_array_equal(cache.read("v", [0.0, 2.0, 4.0]).features, direct)


# --- Stage 2


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_stage_2_gets_numbers_in_a_type_that_torch_computes_with(tmp_path, storage):
    cache = make(tmp_path, storage)
    features = features_of(6)
    write(cache, np.arange(6), features)
    sample = Sample(id="s", video="v", task="scene", question="?", answer="a", split="train", times_s=(1.0, 4.0))
    window = WindowDataset(cache, [sample], tolerance_s=0.0, with_targets=True)[0]
    features_of_window = widened(window.features[None], None if window.scales is None else window.scales[None])[0]
    assert features_of_window.dtype == torch.bfloat16
    torch.testing.assert_close(features_of_window.float(), torch.from_numpy(features[[1, 4]]), rtol=0.01, atol=1.0)
    assert window.targets[:, 0].tolist() == [1.0, 4.0]
