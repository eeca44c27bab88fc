"""The commands on a cache in an object store: extract, info, verify, train, prune, as a user types them."""

import json
import shutil

import pytest

from pipeline.doctor.data import check_cache
from pipeline.settings.config import resolve
from stages.cache import FeatureCache
from stages.cache.convert import convert
from stages.cache.files.places import place_of
from tests.cached import records_of
from tests.conftest import SmallWorld
from tests.in_this_process import in_this_process
from tests.object_stores import BUCKET, filesystem, s3_server

PLACE = f"s3://{BUCKET}/tiny"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A few videos, extracted by `pipeline extract` into a bucket and, for comparison, into a directory."""
    from stages.data.synthetic import generate

    with s3_server():
        made = SmallWorld(tmp_path_factory.mktemp("stored"))
        generate(made.folder / "data", seed=1, videos_per_split={"train": 4, "val": 1, "test": 1}, workers=1)
        for cache in (PLACE, made.cache):
            done = made.run("extract", *made.options(cache=cache), "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["done"] == 6
        yield made


def checksums(place):
    return {record.video: record.checksum for record in records_of(FeatureCache.open(place))}


def test_extraction_into_a_bucket_gives_what_extraction_into_a_directory_gives(stored):
    assert checksums(PLACE) == checksums(stored.cache)


def test_info_verify_and_plan_look_at_the_bucket(stored, monkeypatch, capfd):
    pipeline = in_this_process(monkeypatch, capfd)
    found = json.loads(pipeline("cache", "info", PLACE, "--json")[0])
    assert (found["kind"], found["num_videos"]) == ("zarr", 6)
    assert "every video is whole" in pipeline("cache", "verify", PLACE)[0]
    planned = json.loads(pipeline("plan", *stored.options(cache=PLACE), "--no-calibrate", "--json")[0])
    assert (planned["cache"]["root"], planned["cache"]["done"], planned["disk"]) == (PLACE, 6, None)
    annotations = str(stored.folder / "data" / "annotations")
    options = {"data.dataset": "synthetic", "data.annotations": annotations, "cache.root": PLACE}
    found = {finding.item: finding for finding in check_cache(resolve(preset="tiny", options=options).config)}
    assert (found["videos"].status, found["videos"].detail) == ("ok", "6 of 6 done, 0 failed, 0 pending")
    assert "no feature cache here" in pipeline("cache", "info", f"{PLACE}-none", status=2)[1]


def test_verify_repairs_a_flipped_bit_and_extraction_writes_the_video_anew(stored, monkeypatch, capfd):
    pipeline = in_this_process(monkeypatch, capfd)
    place = f"{PLACE}-damaged"
    filesystem().cp(f"{PLACE}/", f"{place}/", recursive=True)
    chunk = min(filesystem().glob(f"{place}/videos/*/features/c.0.0.0"))
    data = bytearray(filesystem().cat_file(chunk))
    data[5] ^= 1
    filesystem().pipe_file(chunk, bytes(data))
    assert "has CRC-32C" in pipeline("cache", "verify", place, status=3)[0]
    assert "it extracts 1 video again" in pipeline("cache", "verify", place, "--repair")[0]
    assert len(checksums(place)) == 5
    done = stored.run("extract", *stored.options(cache=place), "--json")
    assert json.loads(done.stdout)["extracted_now"] == 1
    assert checksums(place) == checksums(stored.cache)


def test_training_from_the_bucket_has_the_losses_of_training_from_the_directory(stored):
    losses = []
    for cache, more in (
        (PLACE, []),
        (stored.cache, []),
        (PLACE, ["--set", f"cache.local_copy={stored.folder / 'copy'}"]),
    ):
        name = f"run-{len(losses)}"
        settings = ["--set", "train.epochs=1", "--set", "train.loader_workers=1", *more]
        done = stored.run("train", *stored.options(cache=cache), "--name", name, *settings)
        assert done.returncode == 0, done.stderr
        lines = (stored.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        losses.append([{key: value for key, value in line.items() if "loss" in key} for line in found])
    assert losses[0] == losses[1] == losses[2]
    assert any(losses[0])
    assert len(FeatureCache.open(stored.folder / "copy").video_ids()) >= 4


@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_prune_removes_the_videos_that_a_data_set_does_not_name(stored, monkeypatch, capfd, tmp_path, kind):
    pipeline = in_this_process(monkeypatch, capfd)
    place = str(tmp_path / "cache")
    if kind == "bucket":
        place = f"{PLACE}-pruned"
        convert(FeatureCache.open(PLACE), place_of(place), "zarr", shard_bytes=1, on_video=lambda: None)
    else:
        shutil.copytree(stored.cache, place)
    kept = FeatureCache.open(place)
    frames = kept.read(kept.video_ids()[0], kept.cached_times_s(kept.video_ids()[0]))
    kept.write_video("stranger", times_s=frames.times_s, features=frames.features, targets=frames.targets)
    options = [place, "--videos-not-in", "synthetic", "--annotations", stored.folder / "data" / "annotations"]
    told = json.loads(pipeline("cache", "prune", *options, "--dry-run", "--json")[0])
    assert told["removed"] == ["commits/stranger.json"]
    assert told["freed_bytes"] > 1000
    said = pipeline("cache", "prune", *options, status=2)[1]
    assert "1 committed video would be removed, the first is 'stranger'" in said
    assert "stranger" in kept.video_ids()
    done = json.loads(pipeline("cache", "prune", *options, "--yes", "--json")[0])
    assert (done["removed"], done["freed_bytes"]) == (told["removed"], told["freed_bytes"])
    assert FeatureCache.open(place).video_ids() == FeatureCache.open(stored.cache).video_ids()
    assert "every video is whole" in pipeline("cache", "verify", place)[0]
    assert "0 videos and 0 leftovers" in pipeline("cache", "prune", *options, "--yes")[0]
