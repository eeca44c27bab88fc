"""The feature cache on real directories: what goes in comes out, what must not go in is refused."""

import multiprocessing
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import zarr

from stages.cache import (
    CacheWriteError,
    DamagedCacheError,
    FeatureCache,
    Fingerprint,
    MissingFramesError,
    storage_type,
)
from stages.errors import UserError
from tests.cached import records_of

FIELDS = {"encoder": "tiny", "layer": 2, "storage": "float16"}


def make(root, **changes) -> FeatureCache:
    return FeatureCache.create_or_open(root, Fingerprint(fields={**FIELDS, **changes}))


def content(num_frames, *, seed=0, dtype=np.float16):
    """25 frames per second, so that times are not round numbers."""
    random = np.random.default_rng(seed)
    return {
        "times_s": np.arange(num_frames) / 25,
        "features": random.standard_normal((num_frames, 3, 4)).astype(dtype),
        "targets": random.standard_normal((num_frames, 5)).astype(np.float32),
    }


@pytest.fixture
def cache(tmp_path):
    return make(tmp_path / "cache")


def group_of(cache, video) -> Path:
    record = next(record for record in records_of(cache) if record.video == video)
    return cache.root / "videos" / record.group


# --- writing and reading


@pytest.mark.parametrize("num_frames", [1, 9, 10, 11, 37])
@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_all_frames_come_back_bit_for_bit(tmp_path, storage, num_frames):
    cache = make(tmp_path, storage=storage)
    written = content(num_frames, dtype=storage)
    cache.write_video("v", **written)
    read = FeatureCache.open(tmp_path).read("v", written["times_s"])
    assert read.features.dtype == storage
    assert read.targets.dtype == np.float32
    for name in ("times_s", "features", "targets"):
        np.testing.assert_array_equal(getattr(read, name), written[name])


@pytest.mark.parametrize(
    "rows",
    [
        range(8, 23),  # a run over three chunks, from the middle of one
        [20],
        [0, 3, 6, 9, 12, 15],  # strided
        [5, 5, 6, 6, 7],  # repeats, as short clips give
        [30, 2, 3, 31, 0],  # any order
        [],
    ],
)
def test_any_choice_of_frames_equals_indexing_the_whole_video(cache, rows):
    written, rows = content(32), list(rows)
    cache.write_video("v", **written)
    read = cache.read("v", written["times_s"][rows])
    np.testing.assert_array_equal(read.features, written["features"][rows])
    np.testing.assert_array_equal(read.targets, written["targets"][rows])


def test_features_or_targets_alone_are_read_without_touching_the_other(cache):
    written = content(20)
    cache.write_video("v", **written)
    shutil.rmtree(group_of(cache, "v") / "features")
    read = cache.read("v", written["times_s"], features=False)
    assert read.features is None
    np.testing.assert_array_equal(read.targets, written["targets"])
    cache.write_video("w", **written)
    shutil.rmtree(group_of(cache, "w") / "targets")
    read = cache.read("w", written["times_s"], targets=False)
    assert read.targets is None
    np.testing.assert_array_equal(read.features, written["features"])


def test_the_group_is_plain_zarr_in_the_documented_layout(cache):
    written = content(23)
    cache.write_video("v", **written)
    group = zarr.open_group(str(group_of(cache, "v")), mode="r")
    assert sorted(group.array_keys()) == ["features", "targets", "times_s"]
    for name, chunks in (("times_s", (23,)), ("features", (10, 3, 4)), ("targets", (10, 5))):
        array = group[name]
        assert array.metadata.zarr_format == 3
        assert array.chunks == chunks
        assert array.shards is None
        assert array.compressors == ()
        assert np.isnan(array.fill_value)
        np.testing.assert_array_equal(array[:], written[name])


def test_float32_features_are_rounded_to_the_storage_type(cache):
    written = content(12, dtype=np.float32)
    cache.write_video("v", **written)
    read = cache.read("v", written["times_s"])
    np.testing.assert_array_equal(read.features, written["features"].astype(np.float16))


def test_arrays_that_are_not_contiguous_are_written_right(cache):
    written = content(12)
    views = {**written, "features": np.asfortranarray(written["features"]), "targets": written["targets"][:, ::-1]}
    cache.write_video("v", **views)
    read = cache.read("v", written["times_s"])
    np.testing.assert_array_equal(read.features, written["features"])
    np.testing.assert_array_equal(read.targets, written["targets"][:, ::-1])
    assert cache.verify("v").ok


def test_a_second_write_replaces_the_first_and_its_group(cache):
    cache.write_video("v", **content(12, seed=1))
    first = group_of(cache, "v")
    second = content(20, seed=2)
    cache.write_video("v", **second)
    assert [path.name for path in (cache.root / "videos").iterdir()] == [group_of(cache, "v").name] != [first.name]
    np.testing.assert_array_equal(cache.read("v", second["times_s"]).features, second["features"])


def test_a_merge_keeps_old_frames_between_the_new_ones(cache):
    whole = content(30)
    odd = {name: array[1::2] for name, array in whole.items()}
    even_and_one_odd = {name: array[[0, 1, *range(2, 30, 2)]] for name, array in whole.items()}
    cache.write_video("v", **odd)
    cache.write_video("v", **even_and_one_odd, merge=True)
    np.testing.assert_array_equal(cache.cached_times_s("v"), whole["times_s"])
    np.testing.assert_array_equal(cache.read("v", whole["times_s"]).features, whole["features"])
    np.testing.assert_array_equal(cache.read("v", whole["times_s"]).targets, whole["targets"])


@pytest.mark.parametrize("damage", ["bit", "missing"])
def test_a_merge_does_not_put_a_new_checksum_under_damaged_frames(cache, damage):
    whole = content(30)
    cache.write_video("v", **{name: array[:20] for name, array in whole.items()})
    chunk = group_of(cache, "v") / "features" / "c.1.0.0"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data) if damage == "bit" else chunk.unlink()
    with pytest.raises(CacheWriteError, match=r"the frames that it has are damaged \(features: chunk 1 .* --repair"):
        cache.write_video("v", **{name: array[20:] for name, array in whole.items()}, merge=True)
    assert len(cache.cached_times_s("v")) == 20
    assert not cache.verify("v").ok


def test_a_reader_that_opened_an_old_revision_goes_on_with_the_new_one(cache):
    reader = FeatureCache.open(cache.root)
    cache.write_video("v", **content(12, seed=1))
    reader.read("v", [0.0])
    second = content(30, seed=2)
    cache.write_video("v", **second)
    np.testing.assert_array_equal(reader.read("v", second["times_s"]).features, second["features"])


def test_equal_content_has_an_equal_checksum_and_other_content_another(cache):
    first = cache.write_video("v", **content(12))
    again = cache.write_video("v", **content(12))
    other = cache.write_video("v", **content(12, seed=1))
    assert first.checksum == again.checksum != other.checksum
    assert first.group != again.group


def read_in_another_process(cache, times_s):
    return cache.read("v", times_s).features


def test_an_opened_cache_can_be_handed_to_a_spawned_worker(cache):
    written = content(15)
    cache.write_video("v", **written)
    cache.read("v", written["times_s"])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        features = pool.apply(read_in_another_process, (cache, written["times_s"]))
    np.testing.assert_array_equal(features, written["features"])


def test_reading_loads_neither_zarr_nor_torch_nor_h5py(cache):
    cache.write_video("v", **content(3))
    program = f"""
        import sys
        from stages.cache import FeatureCache
        FeatureCache.open({str(cache.root)!r}).read("v", [0.04])
        assert not {{"zarr", "torch", "ray", "h5py"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


# --- times


def test_a_time_within_the_tolerance_gives_the_nearest_frame_and_its_own_time(cache):
    written = content(10)
    cache.write_video("v", **written)
    read = cache.read("v", [0.0401, 0.1999, -0.0001, 0.3601], tolerance_s=0.001)
    np.testing.assert_array_equal(read.times_s, written["times_s"][[1, 5, 0, 9]])
    np.testing.assert_array_equal(read.features, written["features"][[1, 5, 0, 9]])


def test_a_missing_time_names_video_time_nearest_frame_and_the_command(tmp_path):
    make(tmp_path)
    cache = FeatureCache.open(tmp_path, extract_command="pipeline extract --dataset lvu --task scene")
    cache.write_video("v7", **content(10))
    with pytest.raises(MissingFramesError) as error:
        cache.read("v7", [0.04, 0.0601, 0.4], tolerance_s=0.001)
    assert isinstance(error.value, UserError)
    assert isinstance(error.value, LookupError)
    assert (
        "video 'v7' has no cached frame within 0.001 s of 0.060100 s (the nearest is at 0.080000 s; "
        "2 of 3 frames missing). Run `pipeline extract --dataset lvu --task scene`"
    ) in str(error.value)


def test_times_must_be_equal_by_default_and_nan_matches_nothing(cache):
    cache.write_video("v", **content(10))
    for time_s in (0.04 + 1e-12, float("nan")):
        with pytest.raises(MissingFramesError):
            cache.read("v", [time_s])


def test_a_video_that_is_not_cached_is_missing_and_an_unsafe_id_is_refused(cache):
    with pytest.raises(MissingFramesError, match=r"video 'v' is not in this cache. Run `pipeline extract"):
        cache.read("v", [0.0])
    for name in ("../v", ".v", "a/b", ""):
        with pytest.raises(UserError, match="video id"):
            cache.read(name, [0.0])
        with pytest.raises(UserError, match="video id"):
            cache.write_video(name, **content(1))


# --- what is refused


@pytest.mark.parametrize("name", ["features", "targets"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_video_array_and_time(cache, name, bad):
    written = content(25)
    written[name][23].flat[1] = bad
    with pytest.raises(CacheWriteError, match=rf"video 'v': {name} of the frame at 0\.920000 s hold NaN or infinity"):
        cache.write_video("v", **written)
    assert cache.video_ids() == []


@pytest.mark.parametrize(("value", "refused"), [(65504.0, False), (65510.0, True), (-7e4, True)])
def test_float32_features_that_overflow_float16_are_refused(cache, value, refused):
    written = content(12, dtype=np.float32)
    written["features"][11, 2, 3] = value
    if refused:
        with pytest.raises(
            CacheWriteError, match=r"video 'v': .* at 0\.440000 s hold a magnitude of \d+, over .*65504"
        ):
            cache.write_video("v", **written)
    else:
        cache.write_video("v", **written)
        assert cache.read("v", [0.44]).features[0, 2, 3] == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((4, 3, 4))}, "features are float64; allowed: float16, float32"),
        ({"targets": np.zeros((4, 5), np.float16)}, "targets are float16; allowed: float32"),
        ({"features": np.zeros((5, 3, 4), np.float16)}, r"features have shape \(5, 3, 4\) .*\[T, P, C\] with T = 4"),
        ({"targets": np.zeros((4, 5, 1), np.float32)}, r"targets have shape .*\[T, D\]"),
        ({"features": np.zeros((4, 0, 4), np.float16)}, "features have shape"),
        ({"times_s": np.array([0.0, 2.0, 1.0, 3.0])}, "strictly increasing"),
        ({"times_s": np.array([0.0, 1.0, 1.0, 2.0])}, "strictly increasing"),
        ({"times_s": np.array([0.0, 1.0, 2.0, np.nan])}, "finite"),
    ],
)
def test_wrong_types_shapes_and_times_are_refused(cache, changes, message):
    with pytest.raises(CacheWriteError, match=message):
        cache.write_video("v", **{**content(4), **changes})


def test_a_merge_of_other_widths_is_refused(cache):
    cache.write_video("v", **content(4))
    with pytest.raises(CacheWriteError, match="video 'v': new frames have"):
        cache.write_video(
            "v",
            times_s=np.array([9.0]),
            features=np.zeros((1, 3, 8), np.float16),
            targets=np.zeros((1, 5), np.float32),
            merge=True,
        )


def test_an_unknown_storage_type_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"got 'int4'; allowed: float16, float32"):
        storage_type("int4")


# --- opening


def test_opening_with_another_fingerprint_is_refused_and_leaves_the_cache_alone(cache):
    with pytest.raises(UserError, match=r"another layer; got 2; allowed: 3"):
        make(cache.root, layer=3)
    assert make(cache.root).fingerprint.fields == FIELDS


def test_a_directory_with_other_files_is_not_taken_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not a feature cache .* not empty; got 'thesis.tex'"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'file'))}: .* this is a file"):
            make(place)


def test_the_leftover_of_a_creation_that_was_killed_does_not_block_the_next(tmp_path):
    (tmp_path / ".fingerprint.json.abc123.tmp").write_text("{")
    assert make(tmp_path).video_ids() == []


def test_a_video_committed_under_another_fingerprint_is_not_read(tmp_path):
    one, other = make(tmp_path / "one"), make(tmp_path / "other", layer=9)
    one.write_video("v", **content(3))
    for folder in ("videos", "commits"):
        shutil.copytree(one.root / folder, other.root / folder)
    with pytest.raises(DamagedCacheError, match="another fingerprint"):
        other.read("v", [0.0])
    assert "another fingerprint" in other.verify("v").problems[0]
