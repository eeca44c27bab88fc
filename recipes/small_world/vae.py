"""The KL-VAE of the small world: 64 px pictures to latents of 4 channels, an eighth as wide and high."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.small_world.frames import TEACHER_PX, Frames
from recipes.small_world.optimise import Trained, optimise
from recipes.small_world.settings import VAESettings

_LATENT_CHANNELS = 4
_NORM_GROUPS = 4
_CHUNK = 64


def train_vae(
    settings: VAESettings, frames: Frames, *, seed: int, device: torch.device
) -> tuple[AutoencoderKL, Trained]:
    """Train on all frames; `scaling_factor` makes the latents' deviation 1, as Stable Diffusion's does."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=settings.channels,
        down_block_types=("DownEncoderBlock2D",) * len(settings.channels),
        up_block_types=("UpDecoderBlock2D",) * len(settings.channels),
        layers_per_block=1,
        norm_num_groups=_NORM_GROUPS,
        latent_channels=_LATENT_CHANNELS,
        sample_size=TEACHER_PX,
    ).to(device, memory_format=torch.channels_last)  # a fifth faster on a CPU
    draw = torch.Generator().manual_seed(seed)

    def loss_of(_: int) -> Tensor:
        picked = torch.randint(len(frames.images), (settings.batch,), generator=draw)
        pixels = pixels_of(frames.images[picked].to(device))
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(generator=draw)).sample
        # Square beside absolute error: by only the latter the discs, small and never at one place, are left out.
        error = F.l1_loss(decoded, pixels) + settings.square_weight * F.mse_loss(decoded, pixels)
        error = error + settings.edge_weight * _edge_error(decoded - pixels)
        return error + settings.kl_weight * posterior.kl().mean()

    trained = optimise("VAE", vae.parameters(), loss_of, steps=settings.steps, lr=settings.lr)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    latents = encode(vae, frames.images[torch.randperm(len(frames.images), generator=draw)[:1000]])
    vae.register_to_config(scaling_factor=round(vae.config.scaling_factor / float(latents.std()), 4))
    return vae, trained


def pixels_of(images: Tensor) -> Tensor:
    """Images [N, S, S, 3] uint8 -> pixels [N, 3, S, S] in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images [N, S, S, 3] uint8 -> the posteriors' modes, scaled [N, 4, S/8, S/8], as the teacher reads them."""
    modes = [vae.encode(pixels_of(chunk.to(vae.device))).latent_dist.mode() for chunk in images.split(_CHUNK)]
    latents: Tensor = torch.cat(modes) * vae.config.scaling_factor
    return latents


def _edge_error(error: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours, along rows and along columns; error [N, 3, S, S]."""
    return (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
