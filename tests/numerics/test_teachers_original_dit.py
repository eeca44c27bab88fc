"""The original `DiT-XL-2-256x256.pt` gives the targets of the diffusers folder; what it lacks is named."""

import argparse

import pytest
import torch
from tiny_dit import BLOCKS, HEADS, SIZE_PX, original_tensors, save_pipeline, the_transformer

from model.config import DiTSettings
from stages.errors import UserError
from stages.frozen.load import describe_teacher, load_teacher
from stages.weights.dit_original import HEADS_BY_WIDTH, original_dit_config


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def frames():
    return torch.randint(0, 256, (3, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)


def settings(path, pipeline, **changed):
    return DiTSettings(**{"source": str(path), "vae_source": str(pipeline), "heads": HEADS, **changed})


def save(tmp_path, content):
    path = tmp_path / "DiT-tiny.pt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("form", ["plain", "ema"])
@pytest.mark.parametrize("block", [1, 8])
def test_the_original_file_gives_the_targets_of_the_diffusers_folder(frames, pipeline, tmp_path, form, block):
    tensors = original_tensors()
    others = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    path = save(tmp_path, tensors if form == "plain" else {"model": others, "ema": tensors})
    teacher = load_teacher(settings(path, pipeline, block=block))
    expected = load_teacher(DiTSettings(source=str(pipeline), block=block))
    assert torch.equal(teacher(frames), expected(frames))
    assert (teacher.size_px, teacher.width) == (expected.size_px, expected.width)
    assert describe_teacher(settings(path, pipeline)).size_px == SIZE_PX


def test_a_vae_may_have_a_repository_of_its_own(frames, pipeline, tmp_path):
    path = save(tmp_path, original_tensors())
    alone = load_teacher(settings(path, pipeline / "vae"))
    assert torch.equal(alone(frames), load_teacher(settings(path, pipeline))(frames))


def test_a_pipeline_may_take_another_vae(frames, pipeline, tmp_path):
    (tmp_path / "transformer").symlink_to(pipeline / "transformer")
    teacher = load_teacher(DiTSettings(source=str(tmp_path), vae_source=str(pipeline / "vae")))
    assert torch.equal(teacher(frames), load_teacher(DiTSettings(source=str(pipeline)))(frames))


def test_later_blocks_and_the_output_layers_need_not_exist(frames, pipeline, tmp_path):
    read = ("x_embedder.", "t_embedder.", "y_embedder.", "pos_embed", "blocks.0.", "blocks.1.")
    tensors = {name: tensor for name, tensor in original_tensors().items() if name.startswith(read)}
    teacher = load_teacher(settings(save(tmp_path, tensors), pipeline, block=2))
    assert torch.equal(teacher(frames), load_teacher(DiTSettings(source=str(pipeline), block=2))(frames))


def test_the_digest_covers_what_is_read_and_nothing_else(pipeline, tmp_path):
    def digest(name, block=3):
        tensors = original_tensors()
        tensors[name] = tensors[name] + 1
        return describe_teacher(settings(save(tmp_path, tensors), pipeline, block=block)).digest

    before = describe_teacher(settings(save(tmp_path, original_tensors()), pipeline, block=3)).digest
    read = ("blocks.2.attn.qkv.weight", "blocks.0.adaLN_modulation.1.bias", "y_embedder.embedding_table.weight")
    assert len({before, *map(digest, read), *map(digest, ("t_embedder.mlp.0.bias", "x_embedder.proj.bias"))}) == 6
    unread = ("blocks.3.attn.qkv.weight", "final_layer.linear.bias", "pos_embed")
    assert {digest(name) for name in unread} == {before}


def test_the_architecture_is_read_off_the_shapes():
    found = original_dit_config(original_tensors(), HEADS)
    config = the_transformer().config
    assert {name: config[name] for name in found} == found
    assert found["num_layers"] == BLOCKS


@pytest.mark.parametrize(("width", "heads"), HEADS_BY_WIDTH.items())
def test_the_heads_of_a_published_width_are_known(width, heads):
    """DiT's own table: S and B and L have heads of 64, XL of 72."""
    assert width / heads == {384: 64, 768: 64, 1024: 64, 1152: 72}[width]
    shapes = {
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "y_embedder.embedding_table.weight": (1001, width),
        "pos_embed": (1, 256, width),
        "blocks.27.attn.qkv.bias": (3 * width,),
    }
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = original_dit_config(tensors, None)
    assert (found["num_attention_heads"], found["sample_size"], found["num_layers"]) == (heads, 32, 28)
    assert found["num_embeds_ada_norm"] == 1000


def message_of(path, pipeline, **changed):
    with pytest.raises(UserError) as caught:
        load_teacher(settings(path, pipeline, **changed))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_width_asks_for_the_heads(pipeline, tmp_path):
    path = save(tmp_path, original_tensors())
    said = "a DiT of width 24 (published: 384, 768, 1024, 1152): set teacher.heads to a divisor of the width"
    assert message_of(path, pipeline, heads=None) == f"{path}: {said}"
    assert message_of(path, pipeline, heads=7) == f"{path}: {said}"


def test_what_the_file_lacks_is_named_as_in_the_file(pipeline, tmp_path):
    tensors = original_tensors()
    del tensors["blocks.2.attn.qkv.weight"]
    path = save(tmp_path, tensors)
    lacking = f"{path}: checkpoint lacks 1 tensor(s) of the DiT: blocks.2.attn.qkv.weight"
    assert message_of(path, pipeline) == lacking
    path = save(tmp_path, {"weight": torch.zeros(2)})
    said = "not an original DiT checkpoint: it has no tensor x_embedder.proj.weight"
    assert message_of(path, pipeline) == f"{path}: {said}"
    assert "holds no tensors by name" in message_of(save(tmp_path, [torch.zeros(2)]), pipeline)
    assert "no such file" in message_of(tmp_path / "gone.pt", pipeline)


def test_blocks_and_classes_that_the_file_lacks_are_refused(pipeline, tmp_path):
    path = save(tmp_path, original_tensors())
    assert "teacher.block is 10, but the DiT has 9 blocks" in message_of(path, pipeline, block=BLOCKS + 1)
    assert "teacher.class_label is 1001" in message_of(path, pipeline, class_label=1001)


def test_a_file_with_more_than_tensors_says_what_to_do(pipeline, tmp_path):
    """DiT's training also stores its command line, whose loading would run code."""
    path = save(tmp_path, {"ema": original_tensors(), "args": argparse.Namespace(lr=1e-4)})
    assert "torch.save(checkpoint['ema'], path)" in message_of(path, pipeline).replace("Save", "save")


def test_a_pipeline_knows_its_own_heads(pipeline):
    with pytest.raises(UserError, match=r"teacher\.heads: .*config\.json has the number of heads"):
        load_teacher(DiTSettings(source=str(pipeline), heads=HEADS))


def test_random_weights_take_the_architecture_alone(frames, pipeline, tmp_path):
    (tmp_path / "vae").symlink_to(pipeline / "vae")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_bytes((pipeline / "transformer" / "config.json").read_bytes())
    untrained = DiTSettings(source=str(tmp_path), random_seed=3)
    from_file = settings(save(tmp_path, original_tensors()), pipeline, random_seed=3)
    assert torch.equal(load_teacher(untrained)(frames), load_teacher(from_file)(frames))
    digests = {describe_teacher(untrained.model_copy(update={"random_seed": seed})).digest for seed in (3, 4)}
    assert len(digests | {describe_teacher(DiTSettings(source=str(pipeline))).digest}) == 3
