"""A video to a cache through Stage 1's worker, with each kind of encoder and teacher."""

import numpy as np
import pytest
import torch
from tiny_dinov2 import build as build_dinov2
from tiny_dinov2 import save as save_dinov2
from tiny_dit import HEADS, original_tensors, save_pipeline
from tiny_towers import save_whole_clip
from tolerances import FLOAT32_NETWORK, relative_difference

from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.decode.frames import FrameRequest
from stages.decode.reader import decode
from stages.errors import UserError
from stages.extract.worker import ExtractionJob, ExtractionWorker, VideoTask
from stages.frozen.identity import feature_fields, fingerprint, settle_precision
from stages.frozen.load import load_encoder, load_teacher, open_encoder, open_teacher
from tests.video_files import write_video

TIMES = np.array([0.0, 0.5, 1.5])


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "v.mp4", height=90, width=160)


def clip_and_dinov2(folder):
    save_whole_clip(folder / "clip")
    save_dinov2(build_dinov2("registers"), folder / "dinov2")
    return [
        f"encoder.source={folder / 'clip'}",
        "encoder.layer=2",
        "teacher.kind=dinov2",
        f"teacher.source={folder / 'dinov2'}",
    ]


def clip_and_original_dit(folder):
    save_whole_clip(folder / "clip")
    save_pipeline(folder / "pipeline")
    torch.save(original_tensors(), folder / "DiT-tiny.pt")
    teacher = [f"teacher.source={folder / 'DiT-tiny.pt'}", f"teacher.heads={HEADS}"]
    return [f"encoder.source={folder / 'clip'}", *teacher, f"teacher.vae_source={folder / 'pipeline'}"]


def clip_and_its_own_tower(folder):
    save_whole_clip(folder / "clip")
    return [
        f"encoder.source={folder / 'clip'}",
        "teacher.kind=tower",
        f"teacher.source={folder / 'clip'}",
        "teacher.block=2",
    ]


def configure(overrides):
    settings = ["extract.decode_workers=1", "extract.storage=float32", "extract.precision=float32"]
    return resolve(preset="tiny", overrides=[*settings, *overrides]).config


@pytest.mark.parametrize("networks", [clip_and_dinov2, clip_and_original_dit, clip_and_its_own_tower])
def test_a_video_is_extracted_with_these_networks(networks, video, tmp_path):
    config = configure(networks(tmp_path))
    extract = settle_precision(config.extract)
    cache = FeatureCache.create_or_open(tmp_path / "cache", fingerprint(config, extract))
    worker = ExtractionWorker(ExtractionJob(config.encoder, config.teacher, extract, str(tmp_path / "cache")))
    try:
        done = worker.process(VideoTask("v", str(video), TIMES))
    finally:
        worker.close()
    assert done.checksum is not None, done
    encoder, teacher = load_encoder(config.encoder), load_teacher(config.teacher)
    sizes = tuple((network.size_px, network.size_px) for network in (encoder, teacher))
    frames = decode(FrameRequest(video, TIMES, sizes, "pyav", 0.5))
    cached = cache.read("v", TIMES)
    for stored, network, view in zip((cached.features, cached.targets), (encoder, teacher), frames.views, strict=True):
        expected = network(torch.from_numpy(view))
        assert stored.shape[-1] == network.width
        assert relative_difference(torch.from_numpy(stored), expected) <= 10 * FLOAT32_NETWORK
        assert relative_difference(expected[0], expected[-1]) > 0.01, "all frames look alike to it"


@pytest.mark.parametrize(
    "networks",
    [
        lambda _: [],
        clip_and_dinov2,
        clip_and_original_dit,
        clip_and_its_own_tower,
        lambda folder: [*clip_and_dinov2(folder), "teacher.pooling=class"],
        lambda folder: [*clip_and_its_own_tower(folder), "teacher.pooling=class"],
    ],
)
def test_what_is_opened_knows_the_shapes_of_what_is_loaded(networks, tmp_path):
    config = configure(networks(tmp_path))
    opened, teacher = open_teacher(config.teacher), load_teacher(config.teacher)
    size = opened.size_px
    tokens = teacher.tokens(torch.zeros(2, size, size, 3, dtype=torch.uint8))
    assert (teacher.size_px, tuple(tokens.shape)) == (size, (2, opened.tokens, opened.width))
    opened, encoder = open_encoder(config.encoder), load_encoder(config.encoder)
    features = encoder(torch.zeros(2, opened.size_px, opened.size_px, 3, dtype=torch.uint8))
    assert tuple(features.shape) == (2, opened.tokens, opened.width)


def test_a_cache_knows_its_networks(tmp_path):
    overrides = clip_and_dinov2(tmp_path)
    config = configure(overrides)
    made = fingerprint(config, settle_precision(config.extract))
    named = {name: made.fields[name] for name in ("encoder.family", "encoder.layer", "teacher.family")}
    assert named == {"encoder.family": "clip", "encoder.layer": 2, "teacher.family": "dinov2_with_registers"}
    made.require_match(feature_fields(config), "cache")
    for changed in ("teacher.block=1", "teacher.pooling=class", "teacher.random_seed=1", "encoder.layer=1"):
        other = configure([*overrides, changed])
        with pytest.raises(UserError, match=changed.partition("=")[0]):
            made.require_match(feature_fields(other), "cache")
        assert fingerprint(other, settle_precision(other.extract)).digest != made.digest


@pytest.mark.parametrize("networks", [lambda _: [], clip_and_dinov2, clip_and_original_dit, clip_and_its_own_tower])
def test_the_tensors_that_are_hashed_are_those_that_are_read(networks, tmp_path):
    config = configure(networks(tmp_path))
    hashed, read = [], []
    fingerprint(config, settle_precision(config.extract), hashed.append)
    load_encoder(config.encoder, read.append)
    load_teacher(config.teacher, read.append)
    assert read == hashed
    assert all(report.taken and not set(report.taken) & set(report.left) for report in read)
    assert any(report.left for report in read)
    assert not any("decoder" in name or "language" in name for report in read for name in report.taken)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_pipeline_of_another_kind_is_refused(component, tmp_path):
    save_pipeline(tmp_path)
    (tmp_path / component / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel", "num_layers": 28}')
    config = configure([f"teacher.source={tmp_path}"])
    with pytest.raises(UserError, match=r"not (a DiT|an SD VAE).*PixArt.*teacher\.source"):
        load_teacher(config.teacher)
