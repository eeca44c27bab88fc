"""A tiny DiT pipeline of diffusers with random weights, in both published layouts, and a plain form of its forward."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTTransformer2DModel

BLOCKS, SIZE_PX, TOKENS, WIDTH, HEADS = 9, 64, 16, 24, 2
NULL_CLASS = 1000


@cache
def the_transformer():
    """Original DiT's LayerNorms, and embedders shared by all blocks, in eval mode."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=BLOCKS, sample_size=8, norm_eps=1e-6
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.linear.weight.normal_(std=0.3)  # adaLN-zero starts as the identity
            block.norm1.linear.bias.normal_(std=0.5)
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
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


def save_pipeline(folder):
    """Write the subfolders of a DiT pipeline that hold weights, as the hub has them."""
    the_transformer().save_pretrained(folder / "transformer")
    the_vae().save_pretrained(folder / "vae")
    return folder


def original_tensors():
    """The transformer under the names of DiT's own code: the inverse of `dit_original`'s map, written by hand."""
    theirs = the_transformer().state_dict()
    first = "transformer_blocks.0.norm1.emb."
    made = {
        "pos_embed": the_transformer().pos_embed.pos_embed.clone(),
        "x_embedder.proj.weight": theirs["pos_embed.proj.weight"],
        "x_embedder.proj.bias": theirs["pos_embed.proj.bias"],
        "t_embedder.mlp.0.weight": theirs[first + "timestep_embedder.linear_1.weight"],
        "t_embedder.mlp.0.bias": theirs[first + "timestep_embedder.linear_1.bias"],
        "t_embedder.mlp.2.weight": theirs[first + "timestep_embedder.linear_2.weight"],
        "t_embedder.mlp.2.bias": theirs[first + "timestep_embedder.linear_2.bias"],
        "y_embedder.embedding_table.weight": theirs[first + "class_embedder.embedding_table.weight"],
    }
    for index in range(BLOCKS):
        block, original = f"transformer_blocks.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            thirds = [theirs[f"{block}.attn1.to_{letter}.{kind}"] for letter in "qkv"]
            made[f"{original}.attn.qkv.{kind}"] = torch.cat(thirds)
            made[f"{original}.attn.proj.{kind}"] = theirs[f"{block}.attn1.to_out.0.{kind}"]
            made[f"{original}.mlp.fc1.{kind}"] = theirs[f"{block}.ff.net.0.proj.{kind}"]
            made[f"{original}.mlp.fc2.{kind}"] = theirs[f"{block}.ff.net.2.{kind}"]
            made[f"{original}.adaLN_modulation.1.{kind}"] = theirs[f"{block}.norm1.linear.{kind}"]
    for kind in ("weight", "bias"):
        made[f"final_layer.adaLN_modulation.1.{kind}"] = theirs[f"proj_out_1.{kind}"]
        made[f"final_layer.linear.{kind}"] = theirs[f"proj_out_2.{kind}"]
    return made


@torch.no_grad()
def scaled_latents(frames):
    """Frames [T, S, S, 3] uint8 -> the VAE's posterior mode, scaled, by diffusers' own forward."""
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    return the_vae().encode(pixels).latent_dist.mode() * the_vae().config.scaling_factor


@torch.no_grad()
def residual_stream_of_diffusers(frames, block, *, class_label=NULL_CLASS, timestep=0):
    """What leaves block `block`, counted from 1, in a full forward pass over the posterior's mode."""
    transformer = the_transformer()
    found = []
    hook = transformer.transformer_blocks[block - 1].register_forward_hook(lambda _, __, out: found.append(out))
    transformer(
        scaled_latents(frames),
        timestep=torch.full((len(frames),), timestep),
        class_labels=torch.full((len(frames),), class_label),
    )
    hook.remove()
    assert len(found) == 1
    return found[0]


@torch.no_grad()
def residual_stream_by_hand(frames, block, *, class_label=NULL_CLASS, timestep=0, spread):
    """DiT's own forward in plain functions over the original tensors; frequency k is 10000^(-k / spread)."""
    tensors = original_tensors()

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def modulated(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    angles = torch.tensor([timestep * math.exp(-math.log(10000) * k / spread) for k in range(128)])
    embedded = linear(torch.cat([angles.cos(), angles.sin()]), "t_embedder.mlp.0")
    condition = linear(F.silu(embedded), "t_embedder.mlp.2") + tensors["y_embedder.embedding_table.weight"][class_label]
    x = F.conv2d(scaled_latents(frames), tensors["x_embedder.proj.weight"], tensors["x_embedder.proj.bias"], stride=2)
    x = x.flatten(2).transpose(1, 2) + tensors["pos_embed"]
    for index in range(block):
        name = f"blocks.{index}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(
            F.silu(condition), f"{name}.adaLN_modulation.1"
        ).chunk(6)
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in linear(modulated(x, shift_a, scale_a), f"{name}.attn.qkv").chunk(3, dim=-1)
        )
        scores = (query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(dim=-1)
        x = x + gate_a * linear((scores @ value).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        inner = F.gelu(linear(modulated(x, shift_m, scale_m), f"{name}.mlp.fc1"), approximate="tanh")
        x = x + gate_m * linear(inner, f"{name}.mlp.fc2")
    return x
