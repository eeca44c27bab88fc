"""Vision towers of CLIP and InstructBLIP as teachers: the tokens of the class of transformers, pooled."""

import json
from itertools import pairwise

import pytest
import torch
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
from transformers import CLIPImageProcessorPil

from model.config import EncoderConfig, ModelConfig, TowerSettings
from stages.errors import UserError
from stages.frozen.identity import feature_fields
from stages.frozen.load import describe_encoder, describe_teacher, load_encoder, load_teacher

INDEX = "model.safetensors.index.json"
SAVES = [save_whole_clip, save_bare_tower, save_projected_tower, save_instructblip]
FAMILIES = [save_whole_clip, save_instructblip]


@pytest.fixture
def frames():
    return torch.randint(0, 256, (2, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)


def settings(folder, **changed):
    return TowerSettings(source=str(folder), **changed)


@pytest.mark.parametrize("save", SAVES)
def test_the_target_is_the_mean_over_the_last_patch_tokens(save, frames, tmp_path):
    hidden = outputs_of_the_class(save(tmp_path), frames).last_hidden_state
    assert hidden.shape == (2, 1 + 4, WIDTH)
    teacher = load_teacher(settings(tmp_path))
    assert relative_difference(teacher.tokens(frames), hidden[:, 1:]) <= FLOAT32_NETWORK
    target = teacher(frames)
    assert (target.dtype, teacher.width, teacher.size_px) == (torch.float32, WIDTH, SIZE_PX)
    assert relative_difference(target, hidden[:, 1:].mean(dim=1)) <= FLOAT32_NETWORK
    assert relative_difference(target, hidden.mean(dim=1)) > WRONG_BY * FLOAT32_NETWORK, "the class token does not show"


@pytest.mark.parametrize("save", FAMILIES)
def test_the_class_token_alone_may_be_the_target(save, frames, tmp_path):
    outputs = outputs_of_the_class(save(tmp_path), frames)
    target = load_teacher(settings(tmp_path, pooling="class"))(frames)
    assert relative_difference(target, outputs.last_hidden_state[:, 0]) <= FLOAT32_NETWORK
    assert relative_difference(target, outputs.pooler_output) > WRONG_BY * FLOAT32_NETWORK, "one LayerNorm more"


@pytest.mark.parametrize("save", FAMILIES)
@pytest.mark.parametrize("block", range(1, LAYERS + 1))
def test_a_block_is_read_as_it_is_and_blocks_above_are_not_built(save, frames, block, tmp_path):
    states = outputs_of_the_class(save(tmp_path), frames).hidden_states
    assert len(states) == LAYERS + 1
    teacher = load_teacher(settings(tmp_path, block=block))
    tokens = teacher.tokens(frames)
    for index, state in enumerate(states):
        difference = relative_difference(tokens, state[:, 1:])
        assert difference <= FLOAT32_NETWORK if index == block else difference > WRONG_BY * FLOAT32_NETWORK
    names = {name for name, _ in teacher.named_parameters()}
    assert any(f"layers.{block - 1}." in name for name in names)
    assert not any(f"layers.{block}." in name or "post_layernorm" in name for name in names)


@pytest.mark.parametrize("save", FAMILIES)
@pytest.mark.parametrize("layer", [None, 2])
def test_it_is_the_visual_encoder_of_the_same_source(save, layer, frames, tmp_path):
    save(tmp_path)
    encoder = EncoderConfig(source=str(tmp_path), layer=layer)
    teacher = settings(tmp_path, block=layer)
    expected = load_encoder(encoder)(frames)[:, 1:].mean(dim=1)
    assert torch.equal(load_teacher(teacher)(frames), expected)
    assert describe_teacher(teacher) == describe_encoder(encoder)


@pytest.mark.parametrize("build", [build_clip, build_instructblip])
def test_shards_of_other_parts_and_of_later_blocks_may_be_absent(build, frames, tmp_path):
    build().save_pretrained(tmp_path / "all", max_shard_size="2KB")
    build().save_pretrained(tmp_path / "some", max_shard_size="2KB")
    shard_of = json.loads((tmp_path / "some" / INDEX).read_text())["weight_map"]
    read = ("vision_model.embeddings.", "vision_model.pre_layrnorm.", "vision_model.encoder.layers.0.")
    needed = {shard for name, shard in shard_of.items() if name.startswith(read)}
    for shard in set(shard_of.values()) - needed:
        (tmp_path / "some" / shard).unlink()
    some, whole = (settings(tmp_path / name, block=1) for name in ("some", "all"))
    assert torch.equal(load_teacher(some)(frames), load_teacher(whole)(frames))
    assert describe_teacher(some).digest == describe_teacher(whole).digest
    with pytest.raises(UserError, match="is missing"):
        load_teacher(settings(tmp_path / "some"))


def test_the_checkpoint_says_how_its_pixels_are_normalised(frames, tmp_path):
    tower = save_whole_clip(tmp_path)
    usual = describe_teacher(settings(tmp_path))
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    CLIPImageProcessorPil(image_mean=list(own["mean"]), image_std=list(own["std"])).save_pretrained(tmp_path)
    expected = outputs_of_the_class(tower, frames, **own).last_hidden_state[:, 1:].mean(dim=1)
    assert relative_difference(load_teacher(settings(tmp_path))(frames), expected) <= FLOAT32_NETWORK
    described = describe_teacher(settings(tmp_path))
    assert described.digest == usual.digest
    assert described.facts["pixels"] == "mean (0.1, 0.2, 0.3), std (0.5, 0.6, 0.7)"


@pytest.mark.parametrize(("save", "family"), [(save_bare_tower, "clip"), (save_instructblip, "instructblip")])
def test_the_fingerprint_names_family_block_and_pooling(save, family, tmp_path):
    save(tmp_path)
    assert describe_teacher(settings(tmp_path)).facts["family"] == family
    teacher = settings(tmp_path, block=2, pooling="class", random_seed=5)
    fields = feature_fields(ModelConfig(teacher=teacher))
    named = {name: fields[f"teacher.{name}"] for name in ("block", "pooling", "random_seed")}
    assert named == {"block": 2, "pooling": "class", "random_seed": 5}


def test_the_digest_covers_what_is_read_and_nothing_else(tmp_path):
    def digest(name=None, **changed):
        model = build_instructblip()
        if name:
            model.get_parameter(name).data.add_(1)
        model.save_pretrained(tmp_path)
        return describe_teacher(settings(tmp_path, **changed)).digest

    assert digest("vision_model.post_layernorm.bias") != digest()
    assert digest("vision_model.encoder.layers.1.mlp.fc1.bias", block=2) != digest(block=2)
    for unread in ("vision_model.post_layernorm.bias", "vision_model.encoder.layers.2.mlp.fc1.bias"):
        assert digest(unread, block=2) == digest(block=2)
    assert digest("qformer.encoder.layer.0.output.dense.bias") == digest()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block": 4}, "teacher.block is 4, but the network has 3 blocks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changed, said):
    save_whole_clip(tmp_path)
    for look in (load_teacher, describe_teacher):
        with pytest.raises(UserError) as caught:
            look(settings(tmp_path, **changed))
        assert str(caught.value) == f"{tmp_path}: {said}"


def test_a_checkpoint_of_another_family_is_refused_with_the_kind_to_set():
    for look in (load_teacher, describe_teacher):
        with pytest.raises(UserError) as caught:
            look(settings("bundled:tiny-dit"))
        assert str(caught.value) == (
            "teacher.source bundled:tiny-dit: this checkpoint is of another family than teacher.kind=tower. "
            "Set teacher.kind=dit, or teacher.source to a checkpoint of kind tower"
        )


@pytest.mark.parametrize("save", FAMILIES)
def test_random_weights_need_no_checkpoint_and_follow_the_seed(save, frames, tmp_path):
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    save(whole)
    alone.mkdir()
    (alone / "config.json").write_bytes((whole / "config.json").read_bytes())
    state = torch.random.get_rng_state()
    targets = [load_teacher(settings(alone, random_seed=seed))(frames) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(targets[0], targets[1])
    assert relative_difference(targets[2], targets[0]) > 0.1
    assert torch.equal(load_teacher(settings(whole, random_seed=1))(frames), targets[0])
    digests = {describe_teacher(settings(whole, random_seed=seed)).digest for seed in (1, 2, None)}
    assert len(digests) == 3
    described = describe_teacher(settings(alone, random_seed=1))
    assert described.digest in digests, "the folder plays no part"
    assert described.loading == ()


@pytest.mark.parametrize("save", FAMILIES)
def test_an_untrained_tower_is_one_network_whichever_block_is_read(save, frames, tmp_path):
    save(tmp_path)
    whole = load_teacher(settings(tmp_path, random_seed=1, block=LAYERS)).encoder
    states = outputs_of_the_class(whole.vision_model, frames).hidden_states
    tokens = load_teacher(settings(tmp_path, random_seed=1, block=1)).tokens(frames)
    assert relative_difference(tokens, states[1][:, 1:]) <= FLOAT32_NETWORK
    for before, after in pairwise(states):
        assert relative_difference(after, before) > WRONG_BY * FLOAT32_NETWORK, "a block is the identity"
