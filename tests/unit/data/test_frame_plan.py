"""A frame plan names each needed frame once."""

from pathlib import Path

import numpy as np
import pytest

from stages.data.cards import build_manifest, load_card
from stages.data.frame_plan import plan_frames
from stages.data.manifest import Manifest, Sample, Video

LVU = Path(__file__).resolve().parents[4] / "shared" / "data" / "lvu" / "annotation"


def window(name, video, start_s, end_s, num_frames):
    return Sample(
        id=name,
        video=video,
        task="scene",
        question="?",
        answer="a",
        split="train",
        start_s=start_s,
        end_s=end_s,
        num_frames=num_frames,
        index_fps=10.0,
    )


def test_overlapping_samples_share_their_frames_and_idle_videos_are_left_out():
    videos = {name: Video(id=name, path=f"{name}.mp4", duration_s=60.0) for name in ("v1", "v2", "idle")}
    samples = (window("a", "v1", 0.0, 4.0, 5), window("b", "v1", 2.0, 6.0, 5), window("c", "v2", 0.0, 0.3, 2))
    plan = plan_frames(Manifest("mine", videos, samples))
    assert plan.times_s["v1"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert plan.times_s["v2"].tolist() == [0.0, 0.3]
    assert (plan.num_videos, plan.num_frames) == (2, 9)


def test_a_training_sample_with_jitter_brings_all_its_frames():
    videos = {"v1": Video(id="v1", path="v1.mp4", duration_s=60.0)}
    still = window("a", "v1", 0.0, 4.0, 5)
    drawn = still.model_copy(update={"id": "b", "start_s": 3.5, "end_s": 4.2, "jitter": True})
    plan = plan_frames(Manifest("mine", videos, (still, drawn)))
    assert plan.times_s["v1"].tolist() == [0, 1, 2, 3, 3.5, 3.6, 3.7, 3.8, 3.9, 4, 4.1, 4.2]


@pytest.mark.skipif(not LVU.is_dir(), reason="the LVU annotations are not here")
def test_lvu_needs_exactly_the_published_number_of_distinct_frames():
    plan = plan_frames(build_manifest(load_card("lvu"), annotations=LVU, videos=None))
    assert plan.num_videos == 8198
    assert plan.num_frames == 1_052_940
    off_the_second = sum(int(np.count_nonzero(times != np.floor(times))) for times in plan.times_s.values())
    assert off_the_second == 108_631
    assert all((np.diff(times) > 0).all() for times in plan.times_s.values())
