"""The class-conditional DiT in the VAE's latent space: predicts the noise of Eq. 2 by the loss of Eq. 3."""

import copy

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from recipes.small_world.frames import Frames
from recipes.small_world.optimise import Trained, optimise
from recipes.small_world.settings import DiffusionSettings
from stages.data.synthetic.plan import CLASSES

NUM_CLASSES = CLASSES * CLASSES
NULL_CLASS = NUM_CLASSES
_PATCH = 2
_NORM_EPS = 1e-6


def classes_of(frames: Frames) -> Tensor:
    """[N] int64: scene and genre as one class, scene * 4 + genre."""
    return frames.label("scene") * CLASSES + frames.label("genre")


def noise_schedule() -> DDPMScheduler:
    """Linear betas from 1e-4 to 0.02 in 1,000 steps, as DiT's."""
    # Not clipped, diffusers' default: pixels end at -1 and 1, latents do not, and samples would lose their colours.
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )


def train_dit(
    settings: DiffusionSettings, latents: Tensor, classes: Tensor, *, seed: int
) -> tuple[DiTTransformer2DModel, Trained]:
    """Train on scaled latents [N, 4, S/8, S/8] of classes [N], where they are; returns the weights' moving average."""
    torch.manual_seed(seed)
    device = latents.device
    dit = _untrained(settings, latents).to(device)
    averaged = copy.deepcopy(dit).requires_grad_(False)
    schedule = noise_schedule()
    draw = torch.Generator().manual_seed(seed)

    def loss_of(_: int) -> Tensor:
        picked = torch.randint(len(latents), (settings.batch,), generator=draw)
        steps = torch.randint(schedule.config.num_train_timesteps, (settings.batch,), generator=draw)
        noise = torch.randn(settings.batch, *latents.shape[1:], generator=draw).to(device)
        # The null class by hand: diffusers' own dropout would draw again in every block.
        dropped = torch.rand(settings.batch, generator=draw) < settings.no_class
        labels = classes[picked].masked_fill(dropped, NULL_CLASS).to(device)
        noised = schedule.add_noise(latents[picked], noise, steps.to(device))
        return F.mse_loss(dit(noised, timestep=steps.to(device), class_labels=labels).sample, noise)

    def average() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(dit.parameters()), 1 - settings.ema)

    trained = optimise("DiT", dit.parameters(), loss_of, steps=settings.steps, lr=settings.lr, after_step=average)
    return averaged.eval(), trained


def _untrained(settings: DiffusionSettings, latents: Tensor) -> DiTTransformer2DModel:
    dit = DiTTransformer2DModel(
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_width,
        in_channels=latents.shape[1],
        out_channels=latents.shape[1],
        num_layers=settings.layers,
        sample_size=latents.shape[-1],
        patch_size=_PATCH,
        num_embeds_ada_norm=NUM_CLASSES,
        norm_eps=_NORM_EPS,
    )
    # adaLN-zero: every block starts as the identity, and the whole predicts zero.
    for block in dit.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(dit.proj_out_2.weight)
    nn.init.zeros_(dit.proj_out_2.bias)
    return dit.eval()  # no dropout anywhere: the classes' is done above
