"""What a training is said to take is what the real networks do: tiny ones, counted while they work."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.runs.models import about_of
from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.data.manifest import Sample
from stages.extract.estimate import frame_multiply_adds
from stages.free_memory import usable_of
from stages.frozen.load import load_encoder, load_teacher
from stages.frozen.shapes import frame_shape
from stages.frozen.stand_ins import with_stand_ins
from stages.gpus import ASSUMED_SHARE, COMMON_GPUS, GB, Gpu
from stages.networks.memory_law import ClipShape, Parts
from stages.networks.pretrained import LoadedModel
from stages.train.estimate import estimate_training, num_steps, num_validations
from stages.train.parts import parts_for
from stages.train.trial import random_batch

FRAMES = 7  # more than the memory has slots


def config_of(*settings):
    return resolve(preset="tiny", overrides=settings).config


def added_product(_total, left, right, **_):
    """Operations of a product that is added in place, which torch's counter overlooks by itself."""
    return 2 * math.prod(left) * right[-1]


@pytest.fixture(scope="module")
def loaded():
    """The tiny model, in whose attention torch can count."""
    config, shape = config_of(), frame_shape(config_of())
    model = LoadedModel.start(
        about_of(config, locations.card_of(config)),
        visual_width=shape.width,
        target_width=shape.teacher_width,
        seed=0,
    )
    model.model.language.model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("kd_frames", ["all", "last", 3])
def test_a_clip_takes_the_multiply_adds_that_torch_counts(kd_frames, loaded):
    config = config_of(f"train.kd_frames={kd_frames}")
    shape = frame_shape(config)
    asked = {"id": "1", "video": "v", "task": "scene", "question": "what is it?", "answer": "hotel", "split": "train"}
    sample = Sample(**asked, times_s=range(FRAMES))
    batch = random_batch(loaded.tokenizers, [sample], shape, distils=True)
    clips = batch.stored
    words, text = clips.question.ids.shape[1], clips.answer.ids.shape[1]
    queries = loaded.model.qformer.num_queries
    clip = ClipShape(FRAMES, shape.tokens, words, queries + text)
    with with_stand_ins(config, ("qformer", "language")) as dressed:
        found = estimate_training(dressed, config.train, clip, target_width=shape.teacher_width, dtype=torch.float32)
    wanted = {"all": None, "last": [FRAMES - 1], 3: [0, 3, 6]}[kd_frames]
    loaded.model.eval()  # without dropout
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added_product}) as counter:
        loaded.model.forward_backward(replace(clips, features=clips.features.float()), kd_frames=wanted)
    counted = counter.get_total_flops() // 2
    assert found.step_multiply_adds == pytest.approx(counted, rel=0.01)
    trained = sum(part.parameters for part in found.parts if part.is_trained)
    assert trained == sum(parameter.numel() for parameter in loaded.model.trained_parameters().values())
    assert sum(part.num_bytes for part in found.parts if part.is_trained) == 16 * trained
    memory = found.memory[found.frames_per_chunk]
    assert sum(part.num_bytes for part in found.parts) == memory.language + memory.trained


def test_a_frame_takes_the_multiply_adds_that_torch_counts():
    config = config_of()
    networks = load_encoder(config.encoder), load_teacher(config.teacher)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for network in networks:
            network(torch.zeros(1, network.size_px, network.size_px, 3, dtype=torch.uint8))
    with with_stand_ins(config, ("encoder", "teacher")) as dressed:
        assert frame_multiply_adds(dressed) == counter.get_total_flops() // 2


def test_steps_and_validations_are_those_of_the_loop():
    train = config_of("train.epochs=5", "train.batch_size=64", "train.validate_every=2").train
    assert num_steps(train, 298) == (5 * 4, 64)
    assert num_steps(train, 10) == (5, 10)
    assert num_steps(train, 0) == (0, 0)
    assert num_validations(train) == 3


def test_the_largest_part_has_fewer_frames_at_once_only_where_no_clip_fits():
    config, shape = config_of(), frame_shape(config_of())
    clip = ClipShape(FRAMES, shape.tokens, 5, 20)
    with with_stand_ins(config, ("qformer", "language")) as dressed:
        found = estimate_training(dressed, config.train, clip, target_width=shape.teacher_width, dtype=torch.float32)
    chunk = found.frames_per_chunk
    half = -(-chunk // 2)
    whole, less = found.memory[chunk], found.memory[half]
    assert found.largest_part(whole.total(3), 64) == Parts(3, chunk)
    assert found.largest_part(whole.total(3), 2) == Parts(2, chunk)
    assert found.largest_part(less.total(1), 64) == Parts(1, half)
    assert found.largest_part(whole.total(0), 64) is None


@pytest.mark.parametrize("megabytes", [0, 5, 9, 20, 60])
def test_what_is_said_to_fit_on_a_gpu_is_what_training_chooses_there(loaded, monkeypatch, megabytes):
    """With so many megabytes free beside the weights; from one frame at a time to several clips."""
    config, shape = config_of("train.loader_workers=0"), frame_shape(config_of())
    clip = ClipShape(FRAMES, shape.tokens, 5, 20)
    with with_stand_ins(config, ("qformer", "language")) as dressed:
        found = estimate_training(dressed, config.train, clip, target_width=shape.teacher_width, dtype=torch.float32)
    assert found.loaded_bytes == sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    free = megabytes * 10**6
    gpu = Gpu("any", GB + found.loaded_bytes + free, None)
    monkeypatch.setattr("stages.train.parts.usable_memory", lambda _device: usable_of(free))
    chosen = parts_for(
        config.train, loaded.model, clip, loaded.compute, samples=64, quantize="none", with_moments=False
    )
    said = found.largest_part(gpu.budget(found.loaded_bytes), 64)
    assert said == chosen or (said is None and chosen == Parts(1, 1))


def test_times_are_the_stated_share_of_the_peak():
    gpu = next(gpu for gpu in COMMON_GPUS if gpu.name == "A100")
    assert gpu.seconds(312e12 * ASSUMED_SHARE / 2) == pytest.approx(1.0)
    assert {gpu.memory_bytes // GB for gpu in COMMON_GPUS} == {16, 24, 48, 80, 141}
