"""DINOv2 as a teacher: the files that transformers writes give the outputs of the class, and nothing more is read."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_dinov2 import BLOCKS, CROP_PX, PATCHES, REGISTERS, VARIANTS, WIDTH, build, save
from tolerances import FLOAT32_NETWORK, WRONG_BY, relative_difference

from model.config import DinoSettings, DiTSettings, ModelConfig
from stages.errors import UserError
from stages.frozen.identity import feature_fields
from stages.frozen.load import describe_teacher, load_teacher

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def network(variant):
    return build(variant)


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    return save(network, tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(build("plain"), tmp_path_factory.mktemp("plain"))


@pytest.fixture
def frames():
    return torch.randint(0, 256, (2, CROP_PX, CROP_PX, 3), dtype=torch.uint8)


def settings(folder, **changed):
    return DinoSettings(source=str(folder), **changed)


@torch.no_grad()
def outputs_of_the_class(network, frames, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    pixels = (frames.permute(0, 3, 1, 2) / 255 - mean) / std
    return network(pixels, output_hidden_states=True)


def special_tokens(variant):
    return 1 + (REGISTERS if variant == "registers" else 0)


def test_the_target_is_the_mean_over_the_last_patch_tokens(variant, network, folder, frames):
    teacher = load_teacher(settings(folder))
    hidden = outputs_of_the_class(network, frames).last_hidden_state
    assert hidden.shape == (2, special_tokens(variant) + PATCHES, WIDTH)
    patches = hidden[:, special_tokens(variant) :]
    assert relative_difference(teacher.tokens(frames), patches) <= FLOAT32_NETWORK
    target = teacher(frames)
    assert (target.dtype, teacher.width, teacher.size_px) == (torch.float32, WIDTH, CROP_PX)
    assert relative_difference(target, patches.mean(dim=1)) <= FLOAT32_NETWORK
    assert relative_difference(target, hidden.mean(dim=1)) > WRONG_BY * FLOAT32_NETWORK, "other tokens do not show"


def test_the_class_token_alone_may_be_the_target(network, folder, frames):
    teacher = load_teacher(settings(folder, pooling="class"))
    expected = outputs_of_the_class(network, frames).pooler_output
    assert relative_difference(teacher(frames), expected) <= FLOAT32_NETWORK


@pytest.mark.parametrize("block", range(1, BLOCKS + 1))
def test_a_block_is_read_as_it_is_and_blocks_above_are_not_built(variant, network, folder, frames, block):
    teacher = load_teacher(settings(folder, block=block))
    states = outputs_of_the_class(network, frames).hidden_states
    assert len(states) == BLOCKS + 1
    tokens = teacher.tokens(frames)
    for index, state in enumerate(states):
        difference = relative_difference(tokens, state[:, special_tokens(variant) :])
        assert difference <= FLOAT32_NETWORK if index == block else difference > WRONG_BY * FLOAT32_NETWORK
    assert len(teacher.network.encoder.layer) == block
    names = {name for name, _ in teacher.network.named_parameters()}
    assert not any("mask_token" in name or name.startswith("layernorm") for name in names)
    assert any(f"layer.{block - 1}." in name for name in names)


def test_the_files_have_the_published_names(variant, folder):
    """transformers 5 renames them while it loads and saves; these are the names of facebook/dinov2-base."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    feed_forward = "weights_in" if variant == "swiglu" else "fc1"
    assert {f"encoder.layer.0.mlp.{feed_forward}.weight", "encoder.layer.0.attention.attention.query.weight"} <= names


def test_todays_names_load_alike(network, folder, frames, tmp_path):
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    assert torch.equal(load_teacher(settings(tmp_path))(frames), load_teacher(settings(folder))(frames))


def test_only_the_shards_with_needed_tensors_are_opened(network, folder, frames, tmp_path):
    save(network, tmp_path, max_shard_size="3KB")
    shard_of = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    needed = {shard for name, shard in shard_of.items() if name.startswith(("embeddings.", "encoder.layer.0."))}
    unneeded = set(shard_of.values()) - needed
    assert len(unneeded) > 2
    for shard in unneeded:
        (tmp_path / shard).unlink()
    asked = settings(tmp_path, block=1)
    assert torch.equal(load_teacher(asked)(frames), load_teacher(settings(folder, block=1))(frames))
    assert describe_teacher(asked).digest == describe_teacher(settings(folder, block=1)).digest
    with pytest.raises(UserError, match="is missing"):
        load_teacher(settings(tmp_path))


def test_the_checkpoint_says_how_its_pixels_are_normalised(plain, frames, tmp_path):
    network = build("plain")
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    save(network, tmp_path, **own)
    expected = outputs_of_the_class(network, frames, **own).last_hidden_state[:, 1:].mean(dim=1)
    assert relative_difference(load_teacher(settings(tmp_path))(frames), expected) <= FLOAT32_NETWORK
    described, usual = describe_teacher(settings(tmp_path)), describe_teacher(settings(plain))
    assert described.digest == usual.digest
    assert described.facts["pixels"] == "mean (0.1, 0.2, 0.3), std (0.5, 0.6, 0.7)"
    (tmp_path / "preprocessor_config.json").unlink()
    assert describe_teacher(settings(tmp_path)).facts == usual.facts, "ImageNet's, as DINOv2 was trained"
    assert describe_teacher(settings(tmp_path)).size_px == 224
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(UserError, match=r"preprocessor_config\.json: image_mean is not three numbers; got \[0\.5\]"):
        load_teacher(settings(tmp_path))


def test_the_fingerprint_names_family_block_and_pooling(folder, variant):
    described = describe_teacher(settings(folder))
    family = "dinov2_with_registers" if variant == "registers" else "dinov2"
    assert described.facts["family"] == family
    teacher = settings(folder, block=2, pooling="class", random_seed=5)
    fields = feature_fields(ModelConfig(teacher=teacher))
    assert fields["teacher.block"] == 2
    assert fields["teacher.pooling"] == "class"
    assert fields["teacher.random_seed"] == 5


def test_the_digest_covers_what_is_read_and_nothing_else(plain, tmp_path):
    def digest(name, **changed):
        network = build("plain")
        if name:
            network.get_parameter(name).data.add_(1)
        return describe_teacher(settings(save(network, tmp_path), **changed)).digest

    assert digest(None) == describe_teacher(settings(plain)).digest
    assert digest("layernorm.bias") != digest(None)
    assert digest("embeddings.mask_token") == digest(None)
    assert digest("encoder.layer.1.mlp.fc1.bias", block=2) != digest(None, block=2)
    for unread in ("layernorm.bias", "encoder.layer.2.mlp.fc1.bias"):
        assert digest(unread, block=2) == digest(None, block=2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block": 4}, "teacher.block is 4, but the network has 3 blocks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(plain, changed, said):
    for look in (load_teacher, describe_teacher):
        with pytest.raises(UserError) as caught:
            look(settings(plain, **changed))
        assert str(caught.value) == f"{plain}: {said}"


def test_a_checkpoint_of_another_family_is_refused_with_the_kind_to_set(plain):
    for config, kind in ((settings("bundled:tiny-instructblip"), "tower"), (DiTSettings(source=str(plain)), "dinov2")):
        with pytest.raises(
            UserError, match=rf"another family than teacher\.kind={config.kind}.*Set teacher\.kind={kind},"
        ):
            load_teacher(config)


def test_a_picture_that_patches_do_not_fill_is_refused(plain, tmp_path):
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(plain / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 50}))
    with pytest.raises(UserError, match="pictures of 50 px do not consist of patches of 14 px"):
        load_teacher(settings(tmp_path))


def test_random_weights_need_no_checkpoint_and_follow_the_seed(folder, frames, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    state = torch.random.get_rng_state()
    targets = [load_teacher(settings(tmp_path, random_seed=seed))(frames) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(targets[0], targets[1])
    assert relative_difference(targets[2], targets[0]) > 0.1
    assert torch.equal(load_teacher(settings(folder, random_seed=1))(frames), targets[0])
    digests = {describe_teacher(settings(folder, random_seed=seed)).digest for seed in (1, 2, None)}
    assert len(digests) == 3
