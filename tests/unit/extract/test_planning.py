"""What is planned is what is stored: shapes from configuration files, bytes of every storage type, what is left."""

import json
import shutil

import numpy as np
import pytest
import torch

from model.config import DinoSettings, DiTSettings, EncoderConfig, ModelConfig, TowerSettings
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import Fingerprint
from stages.cache.storage import STORAGE_FIELD, STORAGE_TYPES
from stages.data.frame_plan import FramePlan
from stages.errors import UserError
from stages.extract.calibration import Calibration, Rate, StageSeconds, spread
from stages.extract.estimate import VideoWork, bytes_left, cache_state, disk_room, total_bytes, video_sizes
from stages.extract.worker import VideoTask
from stages.frozen.shapes import FrameShape, frame_shape

SHAPE = FrameShape(tokens=5, width=7, teacher_width=3)
FIELDS = {STORAGE_FIELD: "float16", "network": "one"}


def make_cache(root, storage="float16"):
    return FeatureCache.create_or_open(root, Fingerprint(fields={**FIELDS, STORAGE_FIELD: storage}))


def write(cache, video, times_s, merge=False):
    random = np.random.default_rng(0)
    count = len(times_s)
    return cache.write_video(
        video,
        times_s=np.asarray(times_s, dtype=np.float64),
        features=random.standard_normal((count, SHAPE.tokens, SHAPE.width)).astype(np.float32),
        targets=random.standard_normal((count, SHAPE.teacher_width)).astype(np.float32),
        merge=merge,
    )


def plan_of(**frames):
    return FramePlan({video: np.arange(float(count)) for video, count in frames.items()})


# --- shapes


def config_of(encoder="bundled:tiny-instructblip", teacher="bundled:tiny-dit", kind=DiTSettings, **teacher_settings):
    return ModelConfig(
        encoder=EncoderConfig(source=str(encoder)), teacher=kind(source=str(teacher), **teacher_settings)
    )


def describe(folder, **content):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_the_tiny_networks_have_the_shapes_of_their_configuration():
    assert frame_shape(resolve(preset="tiny").config) == FrameShape(tokens=65, width=96, teacher_width=112)


def test_the_published_networks_need_not_be_on_this_machine():
    shape = frame_shape(ModelConfig())
    assert (shape.tokens, shape.width, shape.teacher_width) == (257, 1408, 1152)


@pytest.mark.parametrize("inside", [True, False])
def test_a_clip_is_read_whole_or_as_its_vision_tower(tmp_path, inside):
    vision = {"hidden_size": 48, "image_size": 64, "patch_size": 16, "num_hidden_layers": 2}
    if inside:
        folder = describe(tmp_path / "clip", model_type="clip", vision_config=vision)
    else:
        folder = describe(tmp_path / "clip", model_type="clip_vision_model", **vision)
    shape = frame_shape(config_of(encoder=folder))
    assert (shape.tokens, shape.width) == (17, 48)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers"])
def test_a_dinov2_has_its_hidden_width(tmp_path, family):
    folder = describe(tmp_path / "dino", model_type=family, hidden_size=36, num_hidden_layers=2, num_attention_heads=2)
    assert frame_shape(config_of(teacher=folder, kind=DinoSettings)).teacher_width == 36


@pytest.mark.parametrize("inside", [True, False])
def test_a_vision_tower_as_the_teacher_has_its_hidden_width(tmp_path, inside):
    vision = {"hidden_size": 48, "image_size": 64, "patch_size": 16, "num_hidden_layers": 2}
    if inside:
        folder = describe(tmp_path / "clip", model_type="clip", vision_config=vision)
    else:
        folder = describe(tmp_path / "clip", model_type="clip_vision_model", **vision)
    assert frame_shape(config_of(teacher=folder, kind=TowerSettings)).teacher_width == 48
    assert frame_shape(config_of(teacher="bundled:tiny-instructblip", kind=TowerSettings)).teacher_width == 96


def test_the_published_encoder_as_its_own_teacher_need_not_be_on_this_machine():
    source = "Salesforce/instructblip-vicuna-7b"
    assert frame_shape(config_of(encoder=source, teacher=source, kind=TowerSettings)) == FrameShape(
        257, 1408, 1408, (source,)
    )


def test_an_original_dit_file_has_the_width_of_its_tensors(tmp_path):
    tensors = {
        "x_embedder.proj.weight": torch.zeros(384, 4, 2, 2),
        "y_embedder.embedding_table.weight": torch.zeros(1001, 384),
        "pos_embed": torch.zeros(1, 16, 384),
        "blocks.8.attn.qkv.weight": torch.zeros(1),
    }
    torch.save({"ema": tensors}, tmp_path / "dit.pt")
    assert frame_shape(config_of(teacher=tmp_path / "dit.pt")).teacher_width == 384


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"encoder": "no/such-thing"}, "got 'no/such-thing'"),
        ({"encoder": "bundled:tiny-dit"}, "file config.json is missing"),
        (
            {"teacher": "bundled:tiny-instructblip", "kind": TowerSettings, "block": 5},
            "teacher.block is 5, but the network has 4",
        ),
        ({"teacher": "bundled:tiny-instructblip"}, "Set teacher.kind=tower"),
        ({"teacher": "nowhere.pt"}, "teacher.source: no such file; got 'nowhere.pt'"),
        ({"block": 11}, "teacher.block is 11, but the DiT has 10 blocks"),
    ],
)
def test_networks_that_extraction_would_refuse_cannot_be_planned_for(wrong, said):
    with pytest.raises(UserError) as refused:
        frame_shape(config_of(**wrong))
    assert said in str(refused.value)


# --- bytes


@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize("frames", [1, 9, 10, 23])
def test_every_storage_type_takes_the_bytes_that_are_planned(tmp_path, storage, frames):
    record = write(make_cache(tmp_path / "cache", storage), "v", np.arange(frames))
    size = video_sizes(SHAPE)[storage]
    assert size.zarr_bytes(frames) == record.stored_bytes
    assert size.array_bytes(frames) == record.num_bytes
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache" / "videos").rglob("c.*"))
    assert size.zarr_bytes(frames) == on_disk


def test_the_last_chunk_of_a_long_video_is_padded_and_that_of_a_short_one_is_not():
    size = video_sizes(SHAPE)["float16"]
    frame, time = 5 * 7 * 2 + 3 * 4, 8
    assert size.zarr_bytes(11) == 20 * frame + 11 * time
    assert size.zarr_bytes(9) == size.array_bytes(9) == 9 * (frame + time)
    assert total_bytes({"float16": size}, [11, 9], zarr=True) == {"float16": 29 * frame + 20 * time}


def test_what_a_video_grows_by_is_what_its_files_grow_by(tmp_path):
    cache = make_cache(tmp_path / "cache")
    before = write(cache, "v", np.arange(5.0))
    state = cache_state(cache.root, plan_of(v=12), FIELDS, place_of)
    assert state.work == {"v": VideoWork(frames=7, before=5, after=12)}
    after = write(cache, "v", np.arange(5.0, 12.0), merge=True)
    growth = bytes_left(video_sizes(SHAPE), state.work)["float16"]
    assert growth == after.stored_bytes - before.stored_bytes


# --- what is left


def place_of(video):
    """Where no file is."""
    return f"/nowhere/{video}.mp4"


def test_without_a_cache_everything_is_left(tmp_path):
    state = cache_state(tmp_path / "none", plan_of(a=2, b=3), FIELDS, place_of)
    assert (state.done, state.failed, state.pending) == (0, 0, 2)
    assert state.work == {"a": VideoWork(2, 0, 2), "b": VideoWork(3, 0, 3)}
    assert not (tmp_path / "none").exists()


def test_done_videos_are_not_left_and_failed_ones_only_when_asked_for(tmp_path):
    cache = make_cache(tmp_path / "cache")
    with cache.ledger.writer() as ledger:
        ledger.done("a", checksum=write(cache, "a", np.arange(2.0)).checksum, attempts=1)
        ledger.failed("b", reason="broken", attempts=1)
    plan = plan_of(a=2, b=3, c=4)
    state = cache_state(cache.root, plan, FIELDS, place_of)
    assert (state.done, state.failed, state.pending, set(state.work)) == (1, 1, 1, {"c"})
    assert set(cache_state(cache.root, plan, FIELDS, place_of, retry_failed=True).work) == {"b", "c"}


def test_a_damaged_video_is_left_as_a_whole(tmp_path):
    cache = make_cache(tmp_path / "cache")
    write(cache, "a", np.arange(3.0))
    (cache.root / "commits" / "a.json").write_text("{broken")
    assert cache_state(cache.root, plan_of(a=3), FIELDS, place_of).work == {"a": VideoWork(3, 0, 3)}


def test_a_cache_of_another_network_is_refused(tmp_path):
    make_cache(tmp_path / "cache")
    with pytest.raises(UserError, match="made with another network"):
        cache_state(tmp_path / "cache", plan_of(a=1), {**FIELDS, "network": "two"}, place_of)


# --- disk and times


def test_room_is_looked_for_at_the_nearest_folder_that_exists(tmp_path):
    room = disk_room(tmp_path / "not" / "yet", needed_bytes=1)
    assert room.folder == tmp_path
    assert room.enough
    assert not disk_room(tmp_path, needed_bytes=2 * shutil.disk_usage(tmp_path).total).enough


def measured(**changed):
    rates = {"decode": Rate(0.4, 10), "networks": Rate(0.3, 10), "write": Rate(0.01, 10)}
    machine = {"device": "some", "devices": 2, "is_gpu": True, "decode_children": 8, "batch_frames": 4}
    return Calibration(**{**rates, **machine, "videos": 1, "failed": {}, **changed})


def test_the_slowest_stage_decides_and_on_a_cpu_decoding_and_networks_are_one():
    assert measured().seconds(100) == StageSeconds(decode=5.0, networks=15.0, write=1.0, total=15.0)
    assert measured(decode_children=1).seconds(100).total == 40.0
    assert measured(is_gpu=False, devices=1).seconds(100).total == pytest.approx(5 + 30)
    assert measured(is_gpu=False, write=Rate(2.0, 1)).seconds(100).total == 200.0


def test_the_videos_to_measure_are_the_same_whatever_their_order():
    tasks = [VideoTask(f"v{number:03}", "", np.zeros(1)) for number in range(100)]
    chosen = [task.video for task in spread(tasks)]
    assert chosen == [task.video for task in spread(tasks[::-1])]
    # Spread over the whole, not the first or the last few.
    assert {int(video[1:]) // 25 for video in chosen[:20]} == {0, 1, 2, 3}
