"""An extraction, its plan and the doctor with the videos at an address, as they are with a folder."""

import json

import pytest

from pipeline.doctor.data import check_data
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.errors import UserError
from tests.cached import records_of
from tests.conftest import run_pipeline
from tests.faults.extract_corpus import VIDEOS, checksums, prepare, run_here
from tests.film_server import serving

pytest.importorskip("aiohttp", reason="fsspec's http needs it")


def test_videos_below_an_address_are_extracted_to_the_same_bits_and_a_missing_one_has_failed(source, corpus):
    videos = sorted((corpus / "data" / "videos").glob("*.mp4"))
    films = {path.name: path for path in videos[1:]}
    with serving(films) as address:
        summary = run_here(prepare(corpus, "cache", f"data.videos={address}"))
    whole = checksums(source / "whole")
    assert summary.failed == {videos[0].stem: f"missing: no such file: {address}/{videos[0].name}"}
    assert checksums(corpus / "cache") == {video: whole[video] for video in whole if video != videos[0].stem}
    assert summary.done == VIDEOS - 1
    # The folder is back: the same cache goes on from it.
    assert run_here(prepare(corpus, retry_failed=True)).extracted_now == 1
    assert checksums(corpus / "cache") == whole


def test_a_video_that_changed_on_its_server_is_named(corpus):
    videos = sorted((corpus / "data" / "videos").glob("*.mp4"))
    films = {path.name: path for path in videos}
    with serving(films) as address:
        at_url = ("cache", f"data.videos={address}")
        assert run_here(prepare(corpus, *at_url)).done == VIDEOS
        sources = [record.source for record in records_of(FeatureCache.open(corpus / "cache"))]
        assert {source.path for source in sources} == {path.name for path in videos}
        assert [source.num_bytes for source in sources] == [path.stat().st_size for path in videos]
        assert prepare(corpus, *at_url).changes.outdated == ()
        videos[0].write_bytes(videos[1].read_bytes() + b"0")
        videos[2].write_bytes(videos[2].read_bytes()[:-1] + b"0")
        changes = prepare(corpus, *at_url).changes
        assert run_here(prepare(corpus, *at_url, refresh_changed=True)).extracted_now == 2
    assert (set(changes.changed), set(changes.unsure)) == ({videos[0].stem}, {videos[2].stem})
    assert changes.unsure[videos[2].stem] == "another version on the server"


def test_a_plan_counts_videos_at_an_address_without_asking_for_them(corpus):
    annotations = ("--annotations", str(corpus / "data" / "annotations"))
    options = ("--dataset", "synthetic", "--preset", "tiny", *annotations, "--cache", str(corpus / "cache"))
    done = run_pipeline("plan", *options, "--videos", "http://127.0.0.1:9/films", "--json", cwd=corpus)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["videos"], plan["videos_found"], plan["videos_remote"]) == (VIDEOS, 0, VIDEOS)
    assert plan["not_calibrated"] == "none of the planned videos is on this machine"


def test_the_doctor_says_that_videos_at_an_address_are_not_looked_at(corpus):
    options = {"data.dataset": "synthetic", "data.videos": "s3://bucket/films"}
    options["data.annotations"] = str(corpus / "data" / "annotations")
    findings = {one.item: one for one in check_data(resolve(preset="tiny", options=options).config, quick=True)}
    assert findings["videos"].status == "ok"
    assert findings["videos"].detail.startswith("at s3://bucket/films, not looked at")


@pytest.mark.parametrize(
    ("videos", "words"),
    [
        ("memory://films", "memory:// holds nothing that another process could read"),
        ("simplecache::s3://bucket/films", "no address of a video"),
    ],
)
def test_an_address_that_cannot_work_stops_before_anything_runs(corpus, videos, words):
    with pytest.raises(UserError, match=words):
        prepare(corpus, "cache", f"data.videos={videos}")
    assert not (corpus / "cache").exists()


def test_a_protocol_without_a_driver_stops_the_run_and_charges_no_video(corpus):
    extraction = prepare(corpus, "cache", "data.videos=nosuch://place/films")
    with pytest.raises(UserError, match=r"nosuch://place/films/.*: this kind of address is not known; got 'nosuch://'"):
        run_here(extraction)
    assert run_here(prepare(corpus)).failed == {}
