"""What is trained independently of each other, each part a process of its own on machines without a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.small_world.assemble import TEACHER_FOLDER, TOWER_FOLDER, write_dit, write_instructblip
from recipes.small_world.contrast import train_tower
from recipes.small_world.diffusion import classes_of, train_dit
from recipes.small_world.frames import TEACHER_PX, draw
from recipes.small_world.optimise import Trained
from recipes.small_world.settings import WorldSettings
from recipes.small_world.vae import encode, train_vae
from stages.data.synthetic.drawing import SIZE_PX


@dataclass(frozen=True)
class Made:
    """The trainings of a part by network, and the language model's share of right answers if it is one of them."""

    trained: dict[str, Trained]
    reading_accuracy: float | None = None


Part = Callable[[Path, WorldSettings, str], Made]


def _begin(device: str) -> torch.device:
    """One thread for a part: both parts run at once, and the order of additions depends on no number of cores."""
    torch.set_num_threads(1)
    return torch.device(device)


def draw_and_diffuse(folder: Path, settings: WorldSettings, device: str) -> Made:
    """Train the VAE, then the DiT on its latents, and write the teacher's pipeline into `folder`."""
    place = _begin(device)
    frames = draw(settings.frames, size_px=TEACHER_PX)
    vae, vae_trained = train_vae(settings.vae, frames, seed=settings.seed, device=place)
    latents = encode(vae, frames.images)
    dit, dit_trained = train_dit(settings.diffusion, latents, classes_of(frames), seed=settings.seed)
    write_dit(folder / TEACHER_FOLDER, vae.cpu(), dit.cpu())
    return Made({"vae": vae_trained, "dit": dit_trained})


def see_and_read(folder: Path, settings: WorldSettings, device: str) -> Made:
    """Train the vision tower and the language model, and write the InstructBLIP into `folder`."""
    place = _begin(device)
    frames = draw(settings.frames, size_px=SIZE_PX)
    tower, tower_trained = train_tower(settings.contrast, frames, seed=settings.seed, device=place)
    language_trained, accuracy = write_instructblip(folder / TOWER_FOLDER, tower.cpu(), settings)
    return Made({"tower": tower_trained, "language": language_trained}, accuracy)


PARTS: tuple[Part, ...] = (draw_and_diffuse, see_and_read)
