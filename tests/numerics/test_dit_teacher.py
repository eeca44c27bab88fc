"""The truncated, folded teacher against the whole pipeline of diffusers, on random weights."""

from collections.abc import Mapping

import pytest
import torch
from tiny_dit import (
    BLOCKS,
    NULL_CLASS,
    SIZE_PX,
    TOKENS,
    WIDTH,
    residual_stream_by_hand,
    residual_stream_of_diffusers,
    the_transformer,
    the_vae,
)
from tolerances import BFLOAT16_HIDDEN, FLOAT32_NETWORK, WRONG_BY, relative_difference, rms_difference

from model.config import DiTSettings
from model.frozen import FrozenModule
from model.teachers.dit import DiTTeacher


def build_teacher(dit_tensors=None, vae_tensors=None, **settings):
    return DiTTeacher(
        DiTSettings(**settings),
        dit_config=dict(the_transformer().config),
        dit_tensors=the_transformer().state_dict() if dit_tensors is None else dit_tensors,
        vae_config=dict(the_vae().config),
        vae_tensors=the_vae().state_dict() if vae_tensors is None else vae_tensors,
    )


@pytest.fixture
def frames():
    return torch.randint(0, 256, (3, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)


@pytest.mark.parametrize("block", [1, 8, BLOCKS])
def test_the_folded_teacher_gives_the_residual_stream_of_diffusers(frames, block):
    expected = residual_stream_of_diffusers(frames, block)
    teacher = build_teacher(block=block)
    assert expected.shape == (3, TOKENS, WIDTH)
    assert relative_difference(teacher.tokens(frames), expected) <= FLOAT32_NETWORK
    assert len(teacher.blocks) == block
    assert teacher.size_px == SIZE_PX
    assert teacher.width == WIDTH


def test_the_target_is_the_mean_over_the_tokens(frames):
    target = build_teacher()(frames)
    assert target.dtype == torch.float32
    assert relative_difference(target, residual_stream_of_diffusers(frames, 8).mean(dim=1)) <= FLOAT32_NETWORK


@pytest.mark.parametrize("settings", [{"block": 7}, {"block": 9}, {"class_label": 999}, {"timestep": 1}])
def test_a_neighbouring_block_class_or_timestep_shows(frames, settings):
    expected = residual_stream_of_diffusers(frames, 8)
    assert relative_difference(build_teacher(**settings).tokens(frames), expected) > WRONG_BY * FLOAT32_NETWORK


def test_a_block_has_its_folded_parameters_and_no_embedders_or_adaln():
    teacher = build_teacher(block=3)
    in_a_block = 12 * WIDTH**2 + 13 * WIDTH  # qkv, out, up, down and two LayerNorms
    assert sum(parameter.numel() for parameter in teacher.blocks.parameters()) == 3 * in_a_block
    others = {name for name, _ in teacher.named_parameters() if not name.startswith(("blocks.", "latents."))}
    assert others == {"pos_embed.proj.weight", "pos_embed.proj.bias"}
    assert {name.split(".")[1] for name, _ in teacher.latents.named_parameters(prefix="latents")} == {
        "encoder",
        "quant_conv",
    }


@pytest.mark.parametrize(("timestep", "class_label"), [(0, 5), (500, 1000), (999, 0)])
def test_timestep_and_class_can_be_those_of_diffusers(frames, timestep, class_label):
    expected = residual_stream_of_diffusers(frames, 8, timestep=timestep, class_label=class_label)
    teacher = build_teacher(timestep=timestep, class_label=class_label, timestep_embedding="diffusers")
    assert relative_difference(teacher.tokens(frames), expected) <= FLOAT32_NETWORK


# Frequency k of 128 is 10000^(-k/128) in DiT's own code, with which it was trained, and 10000^(-k/127) in diffusers.
SPREAD = {"original": 128, "diffusers": 127}


@pytest.mark.parametrize("embedding", SPREAD)
@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_each_timestep_embedding_is_its_formula(frames, embedding, timestep):
    expected = residual_stream_by_hand(frames, 8, timestep=timestep, spread=SPREAD[embedding])
    teacher = build_teacher(timestep=timestep, timestep_embedding=embedding)
    assert relative_difference(teacher.tokens(frames), expected) <= FLOAT32_NETWORK


def test_the_original_embedding_is_the_default_and_differs_unless_t_is_zero(frames):
    differences = {
        timestep: relative_difference(
            build_teacher(timestep=timestep).tokens(frames),
            build_teacher(timestep=timestep, timestep_embedding="diffusers").tokens(frames),
        )
        for timestep in (0, 500)
    }
    assert differences[0] == 0
    assert differences[500] > WRONG_BY * FLOAT32_NETWORK
    by_default = build_teacher(timestep=500).tokens(frames)
    assert torch.equal(by_default, build_teacher(timestep=500, timestep_embedding="original").tokens(frames))


def test_a_frame_alone_gives_what_it_gives_among_others(frames):
    teacher = build_teacher()
    together = teacher(frames)
    alone = torch.cat([teacher(frame[None]) for frame in frames])
    assert relative_difference(alone, together) <= FLOAT32_NETWORK


def test_the_label_is_never_dropped(frames):
    """In training mode diffusers replaces one class in ten by the null class, anew in every block and call."""
    expected = residual_stream_of_diffusers(frames, 8, class_label=5)
    for seed in range(5):
        torch.manual_seed(seed)
        teacher = build_teacher(class_label=5).train()
        assert not any(part.training for part in teacher.modules())
        assert relative_difference(teacher.tokens(frames), expected) <= FLOAT32_NETWORK


def test_the_teacher_stays_in_eval_mode_inside_a_model_that_trains():
    parent = torch.nn.ModuleDict({"teacher": build_teacher(block=1)}).train()
    assert isinstance(parent["teacher"], FrozenModule)
    assert not any(part.training for part in parent["teacher"].modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())


def old_names(tensors):
    """The attention names of VAE checkpoints written before diffusers renamed them."""
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    return renamed


def test_a_vae_checkpoint_with_old_attention_names_loads_alike(frames):
    teacher = build_teacher(vae_tensors=old_names(the_vae().state_dict()))
    assert torch.equal(teacher(frames), build_teacher()(frames))


class _Watched(Mapping):
    """A checkpoint that notes which of its tensors are read, and how often."""

    def __init__(self, tensors):
        self.tensors, self.read = tensors, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.tensors[name]

    def __contains__(self, name):
        return name in self.tensors

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_only_the_tensors_needed_are_read_and_each_once():
    dit, vae = _Watched(the_transformer().state_dict()), _Watched(the_vae().state_dict())
    build_teacher(dit, vae, block=3)
    needed = [f"transformer_blocks.{index}." for index in range(3)]
    assert {name.split(".")[0] for name in dit.read} == {"pos_embed", "transformer_blocks"}
    assert all(name.startswith(("pos_embed.", *needed)) for name in dit.read)
    assert {name.split(".")[0] for name in vae.read} == {"encoder", "quant_conv"}
    for checkpoint in (dit, vae):
        assert len(checkpoint.read) == len(set(checkpoint.read))


def test_a_block_or_class_the_network_lacks_is_refused():
    with pytest.raises(ValueError, match=r"teacher\.block is 10, but the DiT has 9 blocks"):
        build_teacher(block=BLOCKS + 1)
    with pytest.raises(ValueError, match=r"teacher\.class_label is 1001, but the DiT's classes are 0\.\.\.1000"):
        build_teacher(class_label=NULL_CLASS + 1)


def test_missing_and_misshapen_tensors_are_named():
    tensors = the_transformer().state_dict()
    name = "transformer_blocks.2.attn1.to_q.weight"
    with pytest.raises(ValueError, match=f"lacks 1 tensor.*{name}"):
        build_teacher({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=rf"{name}: checkpoint \(24, 23\), model \(24, 24\)"):
        build_teacher({**tensors, name: tensors[name][:, 1:]})


def test_random_weights_need_no_checkpoint_follow_the_seed_and_keep_the_vae(frames):
    untrained = build_teacher(dit_tensors={}, random_seed=3)
    target = untrained(frames)
    assert torch.equal(target, build_teacher(dit_tensors={}, random_seed=3)(frames))
    assert relative_difference(build_teacher(dit_tensors={}, random_seed=4)(frames), target) > 0.1
    assert relative_difference(target, build_teacher()(frames)) > 0.1
    for name, tensor in the_vae().encoder.state_dict().items():
        assert torch.equal(untrained.latents.encoder.state_dict()[name], tensor)


def test_the_first_blocks_of_an_untrained_teacher_do_not_depend_on_the_block_that_is_read(frames):
    shallow, deep = (build_teacher(dit_tensors={}, random_seed=3, block=block) for block in (2, 5))
    for name, tensor in shallow.state_dict().items():
        assert torch.equal(deep.state_dict()[name], tensor)
    assert relative_difference(deep.tokens(frames), shallow.tokens(frames)) > 0.1, "a block is nearly the identity"


def test_in_lower_precision_the_vae_stays_in_float32(frames):
    teacher = build_teacher()
    expected = teacher(frames)
    teacher.lower_precision(torch.bfloat16)
    assert {parameter.dtype for parameter in teacher.latents.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in teacher.blocks.parameters()} == {torch.bfloat16}
    assert teacher(frames).dtype == torch.float32
    assert 0 < rms_difference([teacher(frames)], [expected]) <= BFLOAT16_HIDDEN
