"""Video files that change, come later or go between two extractions into one cache."""

import json
import os
import shutil

import pytest

from pipeline.doctor.data import check_cache
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from tests.faults.extract_corpus import SETTINGS, VIDEOS, checksums, committed, prepare, problems, run_here


def options(corpus):
    data = corpus / "data"
    named = ("--videos", data / "videos", "--annotations", data / "annotations", "--cache", corpus / "cache")
    return ("--preset", "tiny", *named, *(part for setting in SETTINGS for part in ("--set", setting)))


def doctor(corpus, *, quick=False):
    given = {
        "data.dataset": "synthetic",
        "data.videos": str(corpus / "data" / "videos"),
        "data.annotations": str(corpus / "data" / "annotations"),
        "cache.root": str(corpus / "cache"),
    }
    config = resolve(preset="tiny", options=given, overrides=list(SETTINGS)).config
    return {finding.item: finding for finding in check_cache(config, quick=quick)}


@pytest.fixture
def films(source, corpus):
    """The corpus with its undisturbed cache, and the paths of its videos."""
    shutil.copytree(source / "whole", corpus / "cache")
    paths = sorted((corpus / "data" / "videos").glob("*.mp4"))
    for path in paths:
        shutil.copystat(source / "data" / "videos" / path.name, path)
    return paths


def test_a_replaced_video_is_named_by_each_extraction_until_it_is_done_anew(films, source, corpus, pipeline):
    replaced, model = films[:2]
    replaced.write_bytes(model.read_bytes())
    before = committed(corpus)
    for _ in range(2):
        _, said = pipeline("extract", *options(corpus))
        assert f"warning: video files that have changed since their extraction: 1 ({replaced.stem}: " in said
        assert "--refresh-changed replaces them" in said
    assert committed(corpus) == before
    found = doctor(corpus)["video files"]
    assert (found.status, found.names) == ("problem", (replaced.stem,))
    assert found.fix.endswith("--refresh-changed`, or put the old files back")
    said, _ = pipeline("cache", "verify", corpus / "cache", "--videos", corpus / "data" / "videos", status=3)
    assert f"video files compared with those that the cached frames are from: {VIDEOS}" in said
    assert f"have changed since their extraction: 1 ({replaced.stem}: " in said
    assert "every video is whole" in said

    planned, _ = pipeline("plan", *options(corpus), "--refresh-changed", "--no-calibrate", "--json")
    assert json.loads(planned)["left"]["videos"] == 1
    seen = []
    summary = run_here(prepare(corpus, refresh_changed=True), on_progress=seen.append)
    assert [(one.done, one.failed, one.left) for one in seen] == [(VIDEOS, 0, 0)]
    assert (summary.done, summary.extracted_now, set(summary.changed)) == (VIDEOS, 1, {replaced.stem})
    changed = {video for video, content in committed(corpus).items() if content != before[video]}
    assert changed == {replaced.stem}
    whole, now = checksums(source / "whole"), checksums(corpus / "cache")
    assert now[replaced.stem] != whole[replaced.stem]
    assert run_here(prepare(corpus, refresh_changed=True)).extracted_now == 0
    assert doctor(corpus)["video files"].detail == f"{VIDEOS} are those that the cached frames are from"
    assert problems(corpus / "cache") == []
    pipeline("cache", "verify", corpus / "cache", "--videos", corpus / "data" / "videos")


def test_a_copy_with_a_new_time_may_have_changed_and_is_the_same_when_done_anew(films, source, corpus, pipeline):
    copied = films[0]
    os.utime(copied, (10**9, 10**9))
    _, said = pipeline("extract", *options(corpus))
    assert (
        f"warning: video files that may have changed (same size, another time or version): 1 ({copied.stem}: " in said
    )
    assert doctor(corpus)["video files"].names == (copied.stem,)
    pipeline("cache", "verify", corpus / "cache", "--videos", corpus / "data" / "videos")
    assert run_here(prepare(corpus, refresh_changed=True)).extracted_now == 1
    assert checksums(corpus / "cache") == checksums(source / "whole")
    assert doctor(corpus)["video files"].status == "ok"


def test_a_digest_tells_a_copy_from_another_file_of_the_same_size(source, corpus):
    digests = "extract.digest_videos=true"
    assert run_here(prepare(corpus, "cache", digests)).done == VIDEOS
    assert checksums(corpus / "cache") == checksums(source / "whole")
    copied, replaced = sorted((corpus / "data" / "videos").glob("*.mp4"))[:2]
    content = bytearray(replaced.read_bytes())
    content[-1] ^= 1
    replaced.write_bytes(content)
    for path in (copied, replaced):
        os.utime(path, (10**9, 10**9))
    summary = run_here(prepare(corpus, "cache", digests))
    assert (summary.changed, summary.unsure) == ({replaced.stem: "other content of the same size"}, {})
    quick, thorough = doctor(corpus, quick=True)["video files"], doctor(corpus)["video files"]
    assert (set(quick.names), thorough.names) == ({copied.stem, replaced.stem}, (replaced.stem,))


def test_a_changed_file_that_cannot_be_read_has_failed_and_its_old_frames_are_gone(films, corpus):
    films[0].write_bytes(b"no video" * 99)
    assert run_here(prepare(corpus)).done == VIDEOS
    summary = run_here(prepare(corpus, refresh_changed=True))
    assert (summary.done, set(summary.failed)) == (VIDEOS - 1, {films[0].stem})
    assert films[0].stem not in FeatureCache.open(corpus / "cache").video_ids()
    assert problems(corpus / "cache") == []
    assert set(run_here(prepare(corpus)).failed) == {films[0].stem}


def test_a_file_that_is_gone_after_its_extraction_is_no_change(films, corpus, pipeline):
    films[0].unlink()
    printed, said = pipeline("extract", *options(corpus))
    assert "warning" not in said
    assert f"{VIDEOS} of {VIDEOS} videos done" in printed
    said, _ = pipeline("cache", "verify", corpus / "cache", "--videos", corpus / "data" / "videos")
    assert f"; not there: 1 ({films[0].stem})" in said


def test_files_that_were_missing_are_looked_for_by_every_extraction(source, corpus, pipeline):
    videos = corpus / "data" / "videos"
    late, later = sorted(videos.glob("*.mp4"))[:2]
    aside = [path.rename(corpus / path.name) for path in (late, later)]
    first = run_here(prepare(corpus))
    assert {reason.partition(":")[0] for reason in first.failed.values()} == {"missing"}
    ledgers = {path.name: path.read_bytes() for path in (corpus / "cache" / "ledger").iterdir()}
    assert prepare(corpus).todo == []
    aside[0].rename(late)
    planned, _ = pipeline("plan", *options(corpus), "--no-calibrate", "--json")
    assert json.loads(planned)["left"]["videos"] == 1
    second = run_here(prepare(corpus))
    assert (second.extracted_now, set(second.failed)) == (1, {later.stem})
    aside[1].rename(later)
    assert run_here(prepare(corpus)).failed == {}
    assert checksums(corpus / "cache") == checksums(source / "whole")
    assert ledgers.items() <= {path.name: path.read_bytes() for path in (corpus / "cache" / "ledger").iterdir()}.items()
