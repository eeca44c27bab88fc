"""The visual encoder: CLIP and InstructBLIP towers as transformers writes them, their layers, their pixels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_towers import (
    LAYERS,
    SIZE_PX,
    WIDTH,
    build_clip,
    build_instructblip,
    outputs_of_the_class,
    save_bare_tower,
    save_instructblip,
    save_projected_tower,
    save_whole_clip,
)
from tolerances import FLOAT32_NETWORK, WRONG_BY, relative_difference
from transformers import BitImageProcessorPil, BlipImageProcessorPil, CLIPImageProcessorPil

from model.config import EncoderConfig
from model.pixels import CLIP_PIXELS, IMAGENET_PIXELS
from stages.decode.reader import resize_rgb
from stages.errors import UserError
from stages.frozen.load import describe_encoder, load_encoder

INDEX = "model.safetensors.index.json"
CLIPS = [save_whole_clip, save_bare_tower, save_projected_tower]


@pytest.fixture
def frames():
    return torch.randint(0, 256, (2, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)


def load(folder, **changed):
    return load_encoder(EncoderConfig(source=str(folder), **changed))


def describe(folder, **changed):
    return describe_encoder(EncoderConfig(source=str(folder), **changed))


@pytest.mark.parametrize("save", [*CLIPS, save_instructblip])
def test_the_features_are_the_last_hidden_state_of_the_class(save, frames, tmp_path):
    expected = outputs_of_the_class(save(tmp_path), frames).last_hidden_state
    encoder = load(tmp_path)
    assert expected.shape == (2, 1 + 4, WIDTH)
    assert relative_difference(encoder(frames), expected) <= FLOAT32_NETWORK
    assert (encoder.size_px, encoder.width, describe(tmp_path).size_px) == (SIZE_PX, WIDTH, SIZE_PX)
    assert describe(tmp_path).facts["family"] == ("instructblip" if save is save_instructblip else "clip")


def test_one_tower_in_three_files_has_one_set_of_features(frames, tmp_path):
    features = []
    for save in CLIPS:
        save(tmp_path / save.__name__)
        features.append(load(tmp_path / save.__name__)(frames))
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])


@pytest.mark.parametrize("save", [save_whole_clip, save_instructblip])
@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_a_layer_is_read_as_it_is_and_layers_above_are_not_built(save, frames, layer, tmp_path):
    states = outputs_of_the_class(save(tmp_path), frames).hidden_states
    assert len(states) == LAYERS + 1
    encoder = load(tmp_path, layer=layer)
    features = encoder(frames)
    for index, state in enumerate(states):
        difference = relative_difference(features, state)
        assert difference <= FLOAT32_NETWORK if index == layer else difference > WRONG_BY * FLOAT32_NETWORK
    assert len(encoder.vision_model.encoder.layers) == layer
    assert not any(name.startswith("vision_model.post_layernorm") for name in encoder.state_dict())


def test_only_instructblip_ends_with_a_layer_norm(frames, tmp_path):
    for save in (save_whole_clip, save_instructblip):
        save(tmp_path / save.__name__)
        last, raw = load(tmp_path / save.__name__)(frames), load(tmp_path / save.__name__, layer=LAYERS)(frames)
        assert torch.equal(last, raw) == (save is save_whole_clip)


def test_a_layer_that_the_tower_lacks_is_refused(tmp_path):
    save_whole_clip(tmp_path)
    for look in (load, describe):
        with pytest.raises(UserError) as caught:
            look(tmp_path, layer=LAYERS + 1)
        assert str(caught.value) == f"{tmp_path}: encoder.layer is 4, but the encoder has 3 layers"


@pytest.mark.parametrize("build", [build_clip, build_instructblip])
def test_shards_of_other_parts_and_of_later_layers_may_be_absent(build, frames, tmp_path):
    build().save_pretrained(tmp_path / "all", max_shard_size="2KB")
    build().save_pretrained(tmp_path / "some", max_shard_size="2KB")
    shard_of = json.loads((tmp_path / "some" / INDEX).read_text())["weight_map"]
    read = ("vision_model.embeddings.", "vision_model.pre_layrnorm.", "vision_model.encoder.layers.0.")
    needed = {shard for name, shard in shard_of.items() if name.startswith(read)}
    language = {shard for name, shard in shard_of.items() if name.startswith(("language_model.", "text_model."))}
    assert language - needed
    for shard in set(shard_of.values()) - needed:
        (tmp_path / "some" / shard).unlink()
    encoder = load(tmp_path / "some", layer=1)
    assert torch.equal(encoder(frames), load(tmp_path / "all", layer=1)(frames))
    assert describe(tmp_path / "some", layer=1).digest == describe(tmp_path / "all", layer=1).digest
    with pytest.raises(UserError, match="is missing"):
        load(tmp_path / "some")


def test_the_digest_covers_what_is_read_and_nothing_else(tmp_path):
    def digest(name=None, **changed):
        model = build_instructblip()
        if name:
            model.get_parameter(name).data.add_(1)
        model.save_pretrained(tmp_path)
        return describe(tmp_path, **changed).digest

    assert digest("vision_model.post_layernorm.bias") != digest()
    assert digest("vision_model.encoder.layers.1.mlp.fc1.bias", layer=2) != digest(layer=2)
    for unread in ("vision_model.post_layernorm.bias", "vision_model.encoder.layers.2.mlp.fc1.bias"):
        assert digest(unread, layer=2) == digest(layer=2)
    assert digest("language_model.lm_head.weight") == digest()


@pytest.mark.parametrize("save", [save_bare_tower, save_instructblip])
def test_the_checkpoint_says_how_its_pixels_are_normalised(save, frames, tmp_path):
    tower = save(tmp_path)
    usual = describe(tmp_path)
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    CLIPImageProcessorPil(image_mean=list(own["mean"]), image_std=list(own["std"])).save_pretrained(tmp_path)
    expected = outputs_of_the_class(tower, frames, **own).last_hidden_state
    assert relative_difference(load(tmp_path)(frames), expected) <= FLOAT32_NETWORK
    assert describe(tmp_path).digest == usual.digest
    assert describe(tmp_path).facts["pixels"] != usual.facts["pixels"]


def test_another_network_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "siglip" in message
    assert "instructblip, clip or clip_vision_model" in message


# --- preprocessing, against the image processors of transformers

LARGEST_LEVELS = 2  # grey levels of 255, any value: torch and Pillow round each of the two passes differently
MEAN_LEVELS = 0.05  # mean over the picture: a filter of another kind, which may stay close on smooth ones, cannot pass
SQUARE = {"height": 224, "width": 224}
# Each by name: the name without Pil would take torchvision where it is installed. Centre crops are off, because the
# whole picture is squashed here (docs/teachers.md).
PROCESSORS = {
    "instructblip": (BlipImageProcessorPil(size=SQUARE), CLIP_PIXELS),
    "clip": (CLIPImageProcessorPil(size=SQUARE, do_center_crop=False), CLIP_PIXELS),
    "dinov2": (
        BitImageProcessorPil(
            size=SQUARE, do_center_crop=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        ),
        IMAGENET_PIXELS,
    ),
}
SHAPES = [(240, 320), (117, 331), (500, 223), (224, 224), (50, 61)]


def smooth(height, width):
    noise = np.random.default_rng(1).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def noise(height, width):
    return np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)


def black_and_white(height, width):
    """Edges at which an unclamped bicubic filter leaves the range of a pixel."""
    rows, columns = np.mgrid[:height, :width]
    return np.repeat(((rows // 7 + columns // 9) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)


def horizontal_first(frame):
    """The picture for the processor, a tall one already at its final width.

    Pillow rounds between its passes. Before version 13 the horizontal one always came first, as it does in torch;
    since then the vertical one comes first where it saves more (python-pillow/Pillow#9549), which moves single values
    of a tall picture of noise by some 20 grey levels and the mean by 0.4.
    """
    picture = Image.fromarray(frame)
    height, width = frame.shape[:2]
    return picture.resize((224, height), Image.Resampling.BICUBIC) if height > width else picture


@pytest.mark.parametrize("picture", [smooth, noise, black_and_white])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_image_processor(name, shape, picture):
    processor, statistics = PROCESSORS[name]
    frame = picture(*shape)
    expected = processor(horizontal_first(frame), return_tensors="pt")["pixel_values"][0]
    pixels = statistics.normalise(torch.from_numpy(resize_rgb(frame, (224, 224)))[None])[0]
    assert pixels.shape == expected.shape == (3, 224, 224)
    std = torch.tensor(statistics.std)[:, None, None]
    levels = ((pixels - expected) * std * 255).abs()
    assert levels.max() <= LARGEST_LEVELS + 1e-3
    assert levels.mean() <= MEAN_LEVELS
    mean = torch.tensor(statistics.mean)[:, None, None]
    assert pixels.min() >= ((0 - mean) / std).min() - 1e-6
    assert pixels.max() <= ((1 - mean) / std).max() + 1e-6


def test_a_filter_without_antialiasing_would_not_pass():
    frame = noise(500, 223)
    processor, statistics = PROCESSORS["clip"]
    expected = processor(Image.fromarray(frame), return_tensors="pt")["pixel_values"][0]
    aliased = torch.nn.functional.interpolate(
        torch.from_numpy(frame).permute(2, 0, 1)[None].float(), size=(224, 224), mode="bicubic", align_corners=False
    )
    pixels = statistics.normalise(aliased.clamp(0, 255).round().byte().permute(0, 2, 3, 1))[0]
    assert ((pixels - expected) * torch.tensor(statistics.std)[:, None, None] * 255).abs().max() > 5 * LARGEST_LEVELS
