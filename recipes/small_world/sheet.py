"""A sheet to look at: frames beside what the VAE makes of them, and samples of the DiT for every class."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from PIL import Image, ImageDraw
from torch import Tensor

from recipes.small_world.assemble import TEACHER_FOLDER
from recipes.small_world.diffusion import NULL_CLASS, NUM_CLASSES
from recipes.small_world.frames import TEACHER_PX, draw
from recipes.small_world.settings import WorldSettings
from recipes.small_world.vae import pixels_of
from stages.data.synthetic.plan import CLASSES, LABELS

_ENLARGED = 2
_TITLE_PX = 150
_GAP_PX = 2


def write_sheet(networks: Path, path: Path, settings: WorldSettings) -> None:
    """Write a PNG: two rows of frames and reconstructions of the probes' world, then a row for each class."""
    folder = networks / TEACHER_FOLDER
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    dit = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    schedule = DDIMScheduler.from_pretrained(folder / "scheduler")
    count = settings.sheet_columns
    shown = settings.frames.model_copy(update={"videos": count, "each": 1, "world_seed": settings.probe_seed})
    frames = draw(shown, size_px=TEACHER_PX).images
    with torch.no_grad():
        again = vae.decode(vae.encode(pixels_of(frames)).latent_dist.mode()).sample
        labels = torch.arange(NUM_CLASSES).repeat_interleave(count)
        samples = sample(dit, schedule, labels, settings)
        pictures = vae.decode(samples / vae.config.scaling_factor).sample
    rows = [("frames", frames.numpy()), ("through the VAE", _images(again))]
    rows += [
        (f"{LABELS['scene'][number // CLASSES]}, {LABELS['genre'][number % CLASSES]}", images)
        for number, images in enumerate(np.split(_images(pictures), NUM_CLASSES))
    ]
    _paste(rows).save(path, optimize=True)


@torch.no_grad()
def sample(dit: DiTTransformer2DModel, schedule: DDIMScheduler, labels: Tensor, settings: WorldSettings) -> Tensor:
    """Latents [N, 4, S/8, S/8] of classes [N], by DDIM with classifier-free guidance."""
    generator = torch.Generator().manual_seed(settings.sheet_seed)
    size = dit.config.sample_size
    latents = torch.randn(len(labels), dit.config.in_channels, size, size, generator=generator)
    null = torch.full_like(labels, NULL_CLASS)
    schedule.set_timesteps(settings.sheet_steps)
    for step in schedule.timesteps:
        steps = step.repeat(len(labels))
        guided = dit(latents, timestep=steps, class_labels=labels).sample
        free = dit(latents, timestep=steps, class_labels=null).sample
        noise = free + settings.sheet_guidance * (guided - free)
        latents = schedule.step(noise, step, latents).prev_sample
    return latents


def _images(pixels: Tensor) -> np.ndarray:
    """Pixels [N, 3, S, S] in [-1, 1] -> images [N, S, S, 3] uint8."""
    levels = pixels.clamp(-1, 1).add(1).mul(127.5).round().byte()
    images: np.ndarray = levels.permute(0, 2, 3, 1).contiguous().numpy()
    return images


def _paste(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    side = TEACHER_PX * _ENLARGED + _GAP_PX
    sheet = Image.new("RGB", (_TITLE_PX + side * len(rows[0][1]), side * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for down, (title, images) in enumerate(rows):
        pen.text((4, down * side + side // 2 - 6), title, fill="black")
        for across, image in enumerate(images):
            large = Image.fromarray(image).resize((TEACHER_PX * _ENLARGED,) * 2, Image.Resampling.NEAREST)
            sheet.paste(large, (_TITLE_PX + across * side, down * side))
    return sheet
