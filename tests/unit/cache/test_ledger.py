"""The ledger: every planned video has exactly one state, whatever a kill left behind."""

import json
import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from stages.cache import FeatureCache, Fingerprint
from stages.errors import UserError

TIMES_S = np.arange(6) / 3


@pytest.fixture
def cache(tmp_path):
    return FeatureCache.create_or_open(tmp_path / "cache", Fingerprint(fields={"storage": "float16"}))


def write(cache, video, times_s=TIMES_S, seed=0):
    random = np.random.default_rng(seed)
    return cache.write_video(
        video,
        times_s=times_s,
        features=random.standard_normal((len(times_s), 2, 3)).astype(np.float16),
        targets=random.standard_normal((len(times_s), 4)).astype(np.float32),
    )


def states(cache, planned):
    status = cache.ledger.status(planned)
    listed = [*status.done, *status.failed, *status.pending]
    assert sorted(listed) == sorted(planned), "each planned video has exactly one state"
    return status


def plan(*videos, times_s=TIMES_S):
    return dict.fromkeys(videos, times_s)


def test_done_failed_and_pending_are_told_apart(cache):
    with cache.ledger.writer() as run:
        run.done("good", checksum=write(cache, "good").checksum, attempts=1)
        run.failed("bad", reason="cannot be\n  decoded", attempts=3)
        run.done("outside-the-plan", checksum=write(cache, "outside-the-plan").checksum, attempts=1)
    status = states(cache, plan("good", "bad", "new"))
    assert status.done == {"good"}
    assert status.pending == {"new"}
    assert (status.failed["bad"].reason, status.failed["bad"].attempts) == ("cannot be decoded", 3)
    assert (status.unlisted, status.damaged, status.torn) == (set(), {}, ())


def test_an_empty_plan_and_an_empty_cache_have_a_status(cache):
    assert states(cache, {}).done == set()
    assert states(cache, plan("a", "b")).pending == {"a", "b"}


def test_a_video_is_done_only_when_every_planned_time_is_cached(cache):
    with cache.ledger.writer() as run:
        run.done("v", checksum=write(cache, "v").checksum, attempts=1)
    assert states(cache, {"v": TIMES_S[[1, 4]]}).done == {"v"}
    assert states(cache, {"v": np.append(TIMES_S, 9.0)}).pending == {"v"}
    assert states(cache, {"v": TIMES_S + 1e-9}).pending == {"v"}


@pytest.mark.parametrize(
    ("planned", "covered"), [([], True), ([1.0], True), ([1.0, 3.0], True), ([0.5], False), ([3.0, 3.1], False)]
)
def test_covering_means_every_time_exactly(cache, planned, covered):
    record = write(cache, "v", times_s=np.array([1.0, 2.0, 3.0]))
    assert (record.missing(np.array(planned)).size == 0) is covered


def test_a_deleted_commit_record_makes_a_done_video_pending(cache):
    with cache.ledger.writer() as run:
        run.done("v", checksum=write(cache, "v").checksum, attempts=1)
    (cache.root / "commits" / "v.json").unlink()
    assert states(cache, plan("v")).pending == {"v"}


def test_a_deleted_group_or_a_broken_record_is_pending_with_its_reason(cache):
    with cache.ledger.writer() as run:
        for video in ("a", "b"):
            run.done(video, checksum=write(cache, video).checksum, attempts=1)
    (cache.root / "commits" / "a.json").write_text("{")
    shutil.rmtree(next((cache.root / "videos").glob("b.*")))
    status = states(cache, plan("a", "b"))
    assert status.pending == {"a", "b"}
    assert "a.json: broken commit record" in status.damaged["a"]
    assert "is gone" in status.damaged["b"]


def test_a_record_of_another_fingerprint_is_not_done(cache, tmp_path):
    other = FeatureCache.create_or_open(tmp_path / "other", Fingerprint(fields={"storage": "float16", "layer": 9}))
    record = write(cache, "v")
    for folder in ("videos", "commits"):
        shutil.copytree(cache.root / folder, other.root / folder)
    with other.ledger.writer() as run:
        run.done("v", checksum=record.checksum, attempts=1)
    status = states(other, plan("v"))
    assert status.pending == {"v"}
    assert status.damaged == {"v": "committed with another fingerprint"}


def test_a_record_older_than_a_done_event_with_another_checksum_is_pending(cache):
    write(cache, "v")
    with cache.ledger.writer() as run:
        run.done("v", checksum="0" * 64, attempts=1)
    assert states(cache, plan("v")).pending == {"v"}


def test_a_commit_whose_event_was_lost_is_adopted(cache):
    with cache.ledger.writer("first") as run:
        run.failed("after-failure", reason="timeout", attempts=1)
        run.done("replaced", checksum=write(cache, "replaced").checksum, attempts=1)
    records = {video: write(cache, video, seed=1) for video in ("never-listed", "after-failure", "replaced")}
    planned = plan(*records)
    before = states(cache, planned)
    assert before.done == before.unlisted == set(records)
    with cache.ledger.writer("second") as run:
        cache.ledger.status(planned, adopt=run)
    after = states(cache, planned)
    assert (after.done, after.unlisted) == (set(records), set())
    latest = cache.ledger.read().latest
    assert {video: latest[video].checksum for video in records} == {v: r.checksum for v, r in records.items()}


def test_a_status_without_a_writer_changes_no_file(cache):
    write(cache, "v")
    before = sorted(cache.root.rglob("*"))
    assert states(cache, plan("v")).unlisted == {"v"}
    assert sorted(cache.root.rglob("*")) == before


def test_a_failed_re_run_after_a_good_one_takes_nothing_away(cache):
    with cache.ledger.writer() as run:
        run.done("v", checksum=write(cache, "v").checksum, attempts=1)
        run.failed("v", reason="file is gone", attempts=1)
    assert states(cache, plan("v")).done == {"v"}


def test_the_latest_event_wins_over_writers_by_time_and_within_one_by_order(cache):
    first, second = cache.ledger.writer("z-first"), cache.ledger.writer("a-second")
    first.failed("v", reason="one", attempts=1)
    second.failed("v", reason="two", attempts=2)
    second.failed("v", reason="three", attempts=3)
    assert states(cache, plan("v")).failed["v"].reason == "three"


def test_events_of_one_writer_keep_their_order_when_the_clock_is_set_back(cache):
    with cache.ledger.writer() as run:
        run.failed("v", reason="before", attempts=1)
        run._last = ahead = datetime.now(UTC) + timedelta(hours=1)  # as if the clock had been ahead until now
        run.failed("v", reason="set back", attempts=2)
    latest = cache.ledger.read().latest["v"]
    assert (latest.reason, latest.time) == ("set back", ahead)


def test_half_a_last_line_is_tolerated_and_reported(cache):
    with cache.ledger.writer("run") as run:
        run.failed("a", reason="x", attempts=1)
        run.failed("b", reason="y", attempts=1)
    path = cache.root / "ledger" / "run.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    status = states(cache, plan("a", "b"))
    assert (set(status.failed), status.pending, status.torn) == ({"a"}, {"b"}, (path,))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "",
        "[]",
        json.dumps({"video": "a", "state": "done", "attempts": 1, "time": "2025-01-01T00:00:00Z"}),
        json.dumps({"video": "a", "state": "lost", "reason": "x", "attempts": 1, "time": "2025-01-01T00:00:00Z"}),
        json.dumps({"video": "a", "state": "failed", "reason": "x", "attempts": 0, "time": "2025-01-01T00:00:00Z"}),
        json.dumps({"video": "a", "state": "failed", "reason": "x", "attempts": 1, "time": "2025-01-01T00:00:00"}),
    ],
)
def test_any_other_broken_line_is_an_error_with_file_and_line(cache, line):
    with cache.ledger.writer("run") as run:
        run.failed("a", reason="x", attempts=1)
    path = cache.root / "ledger" / "run.jsonl"
    good = path.read_text()
    path.write_text(good + line + "\n" + good)
    with pytest.raises(UserError, match=r"run\.jsonl:2: broken ledger line"):
        cache.ledger.status(plan("a"))


def test_every_run_has_a_ledger_file_of_its_own(cache):
    with cache.ledger.writer("run") as run:
        run.failed("a", reason="x", attempts=1)
    with pytest.raises(UserError, match="belongs to an earlier run"):
        cache.ledger.writer("run")
    with pytest.raises(UserError, match="ledger name"):
        cache.ledger.writer("../run")
    assert cache.ledger.writer().path != cache.ledger.writer().path


def test_a_run_without_events_leaves_no_ledger_file(cache):
    with cache.ledger.writer():
        pass
    assert not (cache.root / "ledger").exists()
