"""The frozen diffusion teacher: SD-VAE encoder, then the first blocks of a DiT, pooled to y* (paper section 3.2).

With the timestep and the class held constant, the shift, scale and gate that adaLN computes from them are constants
too. They are folded into the neighbouring LayerNorms and linear layers when the weights are loaded, so that what runs
is a plain pre-norm transformer. Only the blocks up to the one that is read are ever built.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.embeddings import PatchEmbed, Timesteps
from torch import Tensor, nn

from model.config import DiTSettings
from model.frozen import TensorView, load_named
from model.teachers.base import Teacher

# Both LayerNorms of the original DiT use 1e-6; diffusers' default for the second is 1e-5.
DIT_NORM_EPS = 1e-6


class LatentEncoder(nn.Module):
    """The encoder half of an `AutoencoderKL`: pixels to the posterior's mode, scaled.

    Args:
        config: the VAE's `config.json`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        latent_channels = config["latent_channels"]
        self.encoder = Encoder(
            in_channels=config["in_channels"],
            out_channels=latent_channels,
            down_block_types=tuple(config["down_block_types"]),
            block_out_channels=tuple(config["block_out_channels"]),
            layers_per_block=config["layers_per_block"],
            act_fn=config["act_fn"],
            norm_num_groups=config["norm_num_groups"],
            double_z=True,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        # Absent from configurations written before the field existed; the SD VAE's value then.
        self.scaling_factor = float(config.get("scaling_factor", 0.18215))
        self.downscale = 2 ** (len(config["block_out_channels"]) - 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [T, 3, S, S] in [-1, 1] -> latents [T, 4, S/8, S/8] for the published VAE."""
        moments = self.quant_conv(self.encoder(pixels))
        mode, _log_variance = moments.chunk(2, dim=1)
        return mode * self.scaling_factor


class FoldedBlock(nn.Module):
    """One DiT block with its adaLN constants folded in: y = x + A(LN1(x)); y + F(LN2(y))."""

    def __init__(self, block: BasicTransformerBlock, constants: Tensor) -> None:
        super().__init__()
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = constants.chunk(6)
        self.heads = block.attn1.heads
        self.norm1 = _affine_norm(1 + scale_msa, shift_msa)
        self.norm2 = _affine_norm(1 + scale_mlp, shift_mlp)
        self.to_qkv = _stack_linear(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        self.to_out = _gated_linear(block.attn1.to_out[0], gate_msa)
        self.up = block.ff.net[0].proj
        self.down = _gated_linear(block.ff.net[2], gate_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream [T, P', D] -> [T, P', D]."""
        frames, tokens, width = x.shape
        qkv = self.to_qkv(self.norm1(x)).view(frames, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.to_out(attended.transpose(1, 2).reshape(frames, tokens, width))
        hidden = F.gelu(self.up(self.norm2(x)), approximate="tanh")
        return x + self.down(hidden)


class DiTTeacher(Teacher):
    """Frames to teacher targets y*: VAE latent, the first `block` DiT blocks, mean over the tokens.

    Args:
        dit_config: `transformer/config.json` of the pipeline.
        dit_tensors: the transformer's tensors by name; only those of the blocks needed are read, none for a transformer
            with random weights.
        vae_config: `vae/config.json`.
        vae_tensors: the VAE's tensors by name; only those of the encoder are read.

    Raises:
        ValueError: the DiT has fewer blocks or classes than asked for, or a tensor is missing or misshapen.
    """

    def __init__(
        self,
        config: DiTSettings,
        *,
        dit_config: Mapping[str, Any],
        dit_tensors: Mapping[str, Tensor],
        vae_config: Mapping[str, Any],
        vae_tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        config.require_fits(dit_config)
        weights = _Weights(dit_tensors, config.random_seed)
        self.latents = LatentEncoder(vae_config)
        load_named(self.latents, _under_modern_names(vae_tensors))
        self.width = dit_config["num_attention_heads"] * dit_config["attention_head_dim"]
        self.size_px = dit_config["sample_size"] * self.latents.downscale
        self.pos_embed = _patch_embed(dit_config, self.width)
        weights.fill(self.pos_embed, prefix="pos_embed.")
        self.blocks = nn.ModuleList(_folded_block(index, config, dit_config, weights) for index in range(config.block))
        self.freeze()

    @torch.no_grad()
    def tokens(self, frames: Tensor) -> Tensor:
        """Frames [T, S, S, 3] uint8 RGB -> residual stream [T, P', D] after the chosen block; P' = 256 as published."""
        pixels = frames.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        return self.residual_stream(self.latents(pixels.to(self.latents.quant_conv.weight.dtype)))

    @torch.no_grad()
    def residual_stream(self, latents: Tensor) -> Tensor:
        """Scaled latents [T, 4, S/8, S/8] -> residual stream [T, P', D] after the chosen block."""
        hidden: Tensor = self.pos_embed(latents.to(self.pos_embed.proj.weight.dtype))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Run the DiT in `dtype`; the VAE stays in float32, its configuration asks for upcasting."""
        self.pos_embed.to(dtype)
        self.blocks.to(dtype)


class _Weights:
    """Where the transformer's weights come from: its checkpoint, or a seed.

    Random weights are drawn as DiT's own initialisation does, Xavier uniform with zero biases, but for adaLN: with
    DiT's zeros every block would be the identity, so its bias (hence the gates) is normal with deviation 0.5.
    """

    def __init__(self, tensors: Mapping[str, Tensor], seed: int | None) -> None:
        self._tensors = tensors
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def fill(self, module: nn.Module, *, prefix: str) -> None:
        if self._generator is None:
            load_named(module, self._tensors, prefix=prefix)
            return
        for name, parameter in module.named_parameters():
            if name == "norm1.linear.bias":
                parameter.normal_(std=0.5, generator=self._generator)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=self._generator)


def _patch_embed(dit_config: Mapping[str, Any], width: int) -> PatchEmbed:
    size = dit_config["sample_size"]
    return PatchEmbed(
        height=size,
        width=size,
        patch_size=dit_config["patch_size"],
        in_channels=dit_config["in_channels"],
        embed_dim=width,
    )


def _folded_block(index: int, config: DiTSettings, dit_config: Mapping[str, Any], weights: _Weights) -> FoldedBlock:
    """Fill one real diffusers block, compute its adaLN constants with its own embedder, fold them, drop the rest."""
    heads, head_width = dit_config["num_attention_heads"], dit_config["attention_head_dim"]
    block = BasicTransformerBlock(
        heads * head_width,
        heads,
        head_width,
        activation_fn=dit_config["activation_fn"],
        num_embeds_ada_norm=dit_config["num_embeds_ada_norm"],
        attention_bias=dit_config["attention_bias"],
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=DIT_NORM_EPS,
    ).eval()
    weights.fill(block, prefix=f"transformer_blocks.{index}.")
    if config.timestep_embedding == "original":
        # Frequencies spaced by 1 / half; diffusers' own by 1 / (half - 1), which is another embedding unless t = 0.
        channels = block.norm1.emb.time_proj.num_channels
        block.norm1.emb.time_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    label = dit_config["num_embeds_ada_norm"] if config.class_label is None else config.class_label
    with torch.no_grad():
        condition = block.norm1.emb(torch.tensor([config.timestep]), torch.tensor([label]), hidden_dtype=torch.float32)
        constants = block.norm1.linear(F.silu(condition)).squeeze(0)  # [6 D]
        return FoldedBlock(block, constants)


def _affine_norm(weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    norm = nn.LayerNorm(weight.numel(), eps=DIT_NORM_EPS)
    norm.weight.data.copy_(weight)
    norm.bias.data.copy_(bias)
    return norm


def _gated_linear(linear: nn.Linear, gate: Tensor) -> nn.Linear:
    """gate * (W x + b) as one linear layer."""
    gated = nn.Linear(linear.in_features, linear.out_features)
    gated.weight.data.copy_(gate[:, None] * linear.weight)
    gated.bias.data.copy_(gate * linear.bias)
    return gated


def _stack_linear(*layers: nn.Linear) -> nn.Linear:
    stacked = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    stacked.weight.data.copy_(torch.cat([layer.weight for layer in layers]))
    stacked.bias.data.copy_(torch.cat([layer.bias for layer in layers]))
    return stacked


# Attention names in VAE checkpoints written before diffusers renamed them.
_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _under_modern_names(tensors: Mapping[str, Tensor]) -> TensorView:
    """A VAE checkpoint under today's attention names."""

    def modern(name: str) -> str:
        for today, old in _OLD_VAE_NAMES.items():
            name = name.replace(f".attentions.0.{old}.", f".attentions.0.{today}.")
        return name

    return TensorView({modern(name): partial(tensors.__getitem__, name) for name in tensors})
