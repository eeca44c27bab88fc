"""The synthetic set: repeatable to the byte, whole after a kill, its answers visible exactly where they should be."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations

import av
import numpy as np
import pytest

from stages.data.cards import build_manifest, differences_from_expected, load_card
from stages.data.frame_plan import plan_frames
from stages.data.synthetic import DEFAULT_VIDEOS_PER_SPLIT, drawing, generate
from stages.data.synthetic.plan import LABELS, annotations_of, plan_videos
from stages.errors import UserError
from stages.evaluate.metrics import majority_floor

SMALL = {"train": 8, "val": 4, "test": 4}
CHANCE = 0.25


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    calls = []
    summary = generate(folder, seed=0, videos_per_split=SMALL, on_video=lambda done, of: calls.append((done, of)))
    return folder, summary, calls


@pytest.fixture(scope="module")
def decoded(made):
    """Every video's frames, `[T, 112, 112, 3]` uint8, by id."""
    frames = {}
    for path in (made[0] / "videos").glob("*.mp4"):
        with av.open(str(path)) as container:
            frames[path.stem] = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return frames


def annotations(folder):
    return {
        name: entry
        for path in (folder / "annotations").glob("*.json")
        for name, entry in json.loads(path.read_text()).items()
    }


def video_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "videos").iterdir())}


# ---- files ----


def test_the_summary_and_the_progress_tell_what_was_written(made):
    folder, summary, calls = made
    assert calls == [(done, 16) for done in range(1, 17)]
    assert (summary.videos, summary.reused) == (16, False)
    assert summary.size_bytes == sum(len(content) for content in video_bytes(folder).values())
    assert summary.duration_s == sum(entry["duration"] for entry in annotations(folder).values())


def test_every_video_is_h264_with_the_annotated_number_of_frames(made, decoded):
    folder, _, _ = made
    for name, entry in annotations(folder).items():
        with av.open(str(folder / "videos" / f"{name}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (112, 112, 10)
            assert not {"creation_time", "encoder"} & {*container.metadata, *stream.metadata}
        assert len(decoded[name]) == entry["num_frames"] == 10 * entry["duration"]


def start_generating(folder, **environment):
    """Start writing the small set with one worker in a process group of its own."""
    script = f"from pathlib import Path; from stages.data.synthetic import generate\ngenerate(Path({str(folder)!r}), "
    script += f"seed=0, videos_per_split={SMALL!r}, workers=1)"
    return subprocess.Popen([sys.executable, "-c", script], start_new_session=True, env={**os.environ, **environment})


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers_and_the_memory(made, tmp_path):
    # The C library fills fresh memory with a pattern, so an encoder that reads memory it never wrote shows.
    assert start_generating(tmp_path, MALLOC_PERTURB_="170").wait(timeout=60) == 0
    assert video_bytes(tmp_path) == video_bytes(made[0])
    assert annotations(tmp_path) == annotations(made[0])


def test_a_finished_folder_is_returned_at_once_and_anything_else_is_made_anew(tmp_path):
    sizes = {"train": 3}
    generate(tmp_path, seed=1, videos_per_split=sizes, workers=1)
    first = video_bytes(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()}
    assert generate(tmp_path, seed=1, videos_per_split=sizes, on_video=pytest.fail).reused
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()} == written

    (tmp_path / "videos" / "train_0001.mp4").unlink()
    assert not generate(tmp_path, seed=1, videos_per_split=sizes, workers=1).reused
    assert video_bytes(tmp_path) == first

    (tmp_path / "videos" / "holiday.mp4").write_bytes(b"not ours")
    assert not generate(tmp_path, seed=2, videos_per_split={"train": 2}, workers=1).reused
    second = video_bytes(tmp_path)
    assert set(second) == {"holiday.mp4", "train_0000.mp4", "train_0001.mp4"}
    assert second["train_0000.mp4"] != first["train_0000.mp4"]


def test_a_damaged_record_makes_the_folder_unfinished(tmp_path):
    generate(tmp_path, videos_per_split={"val": 1})
    (tmp_path / "generated.json").write_text('{"seed": ')
    assert not generate(tmp_path, videos_per_split={"val": 1}).reused


def test_a_kill_leaves_only_whole_videos_and_the_next_run_completes_them(made, tmp_path):
    child = start_generating(tmp_path)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("videos/*.mp4"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    left = {path.name: path.read_bytes() for path in tmp_path.glob("videos/*.mp4")}
    assert 3 <= len(left) < 16
    assert not (tmp_path / "generated.json").exists()
    whole = video_bytes(made[0])
    assert all(content == whole[name] for name, content in left.items())
    generate(tmp_path, seed=0, videos_per_split=SMALL, workers=1)
    assert video_bytes(tmp_path) == whole  # and no temporary file is left


@pytest.mark.parametrize("sizes", [{"train": 0}, {"dev": 4}, {"test": -1}])
def test_a_senseless_size_is_refused(tmp_path, sizes):
    with pytest.raises(UserError, match="allowed: train, val, test with at least 1 video each"):
        generate(tmp_path, videos_per_split=sizes)
    assert not list(tmp_path.iterdir())


# ---- annotations ----


def test_the_card_reads_the_generated_folder(made):
    folder, _, _ = made
    manifest = build_manifest(load_card("synthetic"), annotations=folder / "annotations", videos=folder / "videos")
    assert len(manifest.videos) == 16
    assert all((folder / "videos" / video.path).is_file() for video in manifest.videos.values())
    plan = plan_frames(manifest)
    for name, times_s in plan.times_s.items():
        assert times_s[0] >= 0
        assert times_s[-1] <= manifest.videos[name].duration_s - 0.1  # the last frame's time


@pytest.fixture(scope="module")
def default_manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotations")
    specs = plan_videos(0, DEFAULT_VIDEOS_PER_SPLIT)
    for split in DEFAULT_VIDEOS_PER_SPLIT:
        (folder / f"{split}.json").write_text(json.dumps(annotations_of(specs, split)))
    return build_manifest(load_card("synthetic"), annotations=folder, videos=None)


def test_counts_and_floors_on_the_card_are_those_of_the_default_sizes(default_manifest):
    card = load_card("synthetic")
    assert differences_from_expected(card, default_manifest) == ()
    for task in card.tasks:
        for split in default_manifest.splits:
            answers = [sample.answer for sample in default_manifest.select([task], [split]).samples]
            assert majority_floor(answers) == card.expected[task][split].majority_floor
            assert set(answers) == set(card.tasks[task].labels)


def test_card_generator_and_lvu_agree_on_the_labels():
    card, lvu = load_card("synthetic"), load_card("lvu")
    assert {key: task.labels for key, task in card.tasks.items()} == LABELS
    assert list(card.tasks) == list(lvu.tasks)
    for key, task in card.tasks.items():
        assert set(task.labels) <= set(lvu.tasks[key].labels)
        assert task.prompt == lvu.tasks[key].prompt


def test_the_splits_share_no_video_and_most_videos_are_of_middle_length(default_manifest):
    videos = {split: set(default_manifest.select(splits=[split]).videos) for split in default_manifest.splits}
    assert {split: len(names) for split, names in videos.items()} == DEFAULT_VIDEOS_PER_SPLIT
    assert len(set().union(*videos.values())) == sum(DEFAULT_VIDEOS_PER_SPLIT.values())
    kinds = Counter(
        "short" if video.duration_s <= 6 else "long" if video.duration_s >= 20 else "normal"
        for video in default_manifest.videos.values()
    )
    assert kinds["normal"] > kinds["short"] + kinds["long"] > kinds["long"] > 0
    windows = Counter(sample.video for sample in default_manifest.select(tasks=["scene"]).samples)
    assert set(windows.values()) == {1, 2, 3}


def test_the_tasks_labels_are_independent_of_each_other():
    specs = [spec for seed in range(4) for spec in plan_videos(seed, {"train": 320})]
    for one, other in combinations(LABELS, 2):
        pairs = Counter((spec.labels[one], spec.labels[other]) for spec in specs)
        expected = len(specs) / 16
        chi_square = sum((pairs[a, b] - expected) ** 2 / expected for a in LABELS[one] for b in LABELS[other])
        assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


# ---- what the pixels show ----


def best_label(image, tiles):
    """Return the label whose tile, at its best place in the grey `image`, differs least."""
    errors = {}
    for label, variants in tiles.items():
        for tile in variants:
            views = np.lib.stride_tricks.sliding_window_view(image, tile.shape)
            error = ((views - tile) ** 2).mean((2, 3)).min()
            errors[label] = min(error, errors.get(label, np.inf))
    return min(errors, key=errors.__getitem__)


def test_emblem_glyph_and_face_survive_the_encoder(made, decoded):
    shifts = range(drawing.STRIPE_SHIFTS)
    emblems = {name: [drawing.emblem(name, shift) for shift in shifts] for name in LABELS["director"]}
    glyphs = {name: [drawing.glyph(name)] for name in LABELS["writer"]}
    faces = {name: [drawing.face(name)] for name in LABELS["way_speaking"]}
    for name, entry in annotations(made[0]).items():
        for frame in decoded[name][[0, len(decoded[name]) // 2, -1]]:
            grey = frame.mean(2) / 255
            assert best_label(grey[4:25, 4:25], emblems) == entry["director"]
            assert best_label(grey[78:], glyphs) == entry["writer"]
            assert best_label(grey[:32, 78:], faces) == entry["way_speaking"]


def disc_angles(frames, disc):
    """Return the disc's angle on its orbit in each frame, from the centre of the pixels that have its colour."""
    row, column = drawing.ORBIT_CENTRES_PX[disc]
    area = frames[:, 30:79, :56] if disc == 0 else frames[:, 30:79, 56:]
    near = np.abs(area / 255.0 - drawing.DISC_COLOURS[disc]).max(3) < 0.3
    rows, columns = np.mgrid[30:79, 0:56] + np.array([0, 56 * disc])[:, None, None]
    count = near.sum((1, 2))
    assert count.min() > 60
    return np.arctan2((near * rows).sum((1, 2)) / count - row, (near * columns).sum((1, 2)) / count - column)


def test_the_discs_turns_at_one_frame_a_second_give_the_relationship(made, decoded):
    seen = Counter()
    for name, entry in annotations(made[0]).items():
        speeds = []
        for disc in (0, 1):
            angles = np.unwrap(disc_angles(decoded[name][::10], disc))
            speeds.append(np.polyfit(np.arange(len(angles)), angles, 1)[0])
        turns = [0 if abs(speed) < 0.1 else int(np.sign(speed)) for speed in speeds]
        assert all(abs(speed) < 0.1 or 0.95 < abs(speed) < 1.45 for speed in speeds)
        relation = {(True, 1): "friend", (True, -1): "ex-boyfriend ex-girlfriend", (False, 0): "husband wife"}
        found = relation.get((turns[0] != 0, turns[0] * turns[1]), "boyfriend girlfriend")
        assert found == entry["relationship"]
        seen[found] += 1
    assert set(seen) == set(LABELS["relationship"])


def test_one_frame_and_the_sense_of_turning_tell_nothing_of_the_relationship():
    count = 2000
    for label in LABELS["relationship"]:
        rng = np.random.default_rng(7)
        motions = [drawing.draw_motion(label, rng) for _ in range(count)]
        phases, speeds = (np.array([getattr(m, field) for m in motions]) for field in ("phase_rad", "speed_rad_s"))
        for time_s in (0.0, 3.0):
            a, b = (phases + speeds * time_s).T
            for angle in (a, b, a - b, a + b):
                # the mean of unit vectors at uniform angles is about 1 / sqrt(count) = 0.022 long
                assert abs(np.exp(1j * angle).mean()) < 0.08
        assert abs(np.sign(speeds).mean(0)).max() < 0.08


def test_a_blurred_frame_shows_the_coarse_tasks_and_only_those():
    specs = plan_videos(0, {"train": 320, "test": 96})
    frames = np.stack([drawing.draw_frames(spec.labels, spec.seed, np.array([1.0]))[0] for spec in specs]) / 255
    blurred = frames.reshape(-1, 8, 14, 8, 14, 3).mean((2, 4)).reshape(len(specs), -1)
    train = np.array([spec.split == "train" for spec in specs])
    for task, labels in LABELS.items():
        classes = np.array([labels.index(spec.labels[task]) for spec in specs])
        nearest = ((blurred[~train][:, None] - blurred[train][None]) ** 2).sum(2).argmin(1)
        accuracy = (classes[train][nearest] == classes[~train]).mean()
        if task in ("scene", "genre", "year"):
            assert accuracy > 0.85
        else:
            assert abs(accuracy - CHANCE) < 0.15


def test_the_command_makes_splits_of_other_sizes(tmp_path, pipeline):
    sizes = ("--size", "train=2", "--size", "val=1", "--size", "test=3")
    pipeline("synthesize", tmp_path / "a", *sizes)
    made = sorted(path.stem for path in (tmp_path / "a" / "videos").iterdir())
    assert made == ["test_0000", "test_0001", "test_0002", "train_0000", "train_0001", "val_0000"]
    for wrong, said in (("train", "got 'train'"), ("train=few", "got 'train=few'"), ("dev=3", "got 'dev: 3'")):
        _, told = pipeline("synthesize", tmp_path / "b", "--size", wrong, status=2)
        assert said in told
    assert not (tmp_path / "b").exists()
