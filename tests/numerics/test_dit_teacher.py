"""The truncated, folded teacher against the whole pipeline of diffusers, on random weights."""

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from tolerances import FLOAT32_NETWORK, WRONG_BY, relative_difference

from model.config import TeacherConfig
from model.frozen import FrozenModule
from model.teacher import DiTTeacher

BLOCKS, SIZE_PX, TOKENS, WIDTH = 9, 64, 16, 24
NULL_CLASS = 1000


@cache
def the_transformer():
    """Original DiT's LayerNorms (FACTS.md D.4), in eval mode."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=WIDTH // 2, num_layers=BLOCKS, sample_size=8, norm_eps=1e-6
    )
    with torch.no_grad():
        for block in model.transformer_blocks:  # adaLN-zero starts as the identity
            block.norm1.linear.weight.normal_(std=0.3)
            block.norm1.linear.bias.normal_(std=0.5)
    return model.eval()


@cache
def the_vae():
    torch.manual_seed(1)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE_PX,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.quant_conv.weight.mul_(20)  # latents of order 1, as the trained VAE's
    return model.eval()


def build_teacher(dit_tensors=None, vae_tensors=None, **settings):
    return DiTTeacher(
        TeacherConfig(**settings),
        dit_config=dict(the_transformer().config),
        dit_tensors=the_transformer().state_dict() if dit_tensors is None else dit_tensors,
        vae_config=dict(the_vae().config),
        vae_tensors=the_vae().state_dict() if vae_tensors is None else vae_tensors,
    )


@pytest.fixture
def frames():
    return torch.randint(0, 256, (3, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)


@torch.no_grad()
def residual_stream_of_diffusers(frames, block, *, class_label=NULL_CLASS, timestep=0):
    """What leaves block `block`, counted from 1, in a full forward pass over the posterior's mode."""
    transformer, vae = the_transformer(), the_vae()
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    found = []
    hook = transformer.transformer_blocks[block - 1].register_forward_hook(lambda _, __, out: found.append(out))
    transformer(
        latents,
        timestep=torch.full((len(frames),), timestep),
        class_labels=torch.full((len(frames),), class_label),
    )
    hook.remove()
    assert len(found) == 1
    return found[0]


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


@pytest.mark.parametrize(("timestep", "class_label"), [(0, 5), (500, 1000), (999, 0)])
def test_timestep_and_class_are_those_of_diffusers(frames, timestep, class_label):
    expected = residual_stream_of_diffusers(frames, 8, timestep=timestep, class_label=class_label)
    teacher = build_teacher(timestep=timestep, class_label=class_label)
    assert relative_difference(teacher.tokens(frames), expected) <= FLOAT32_NETWORK


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
