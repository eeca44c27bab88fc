"""What the frozen networks know of the world: linear probes of their features, read as extraction reads them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import DiTSettings, EncoderConfig
from model.teachers.dit import DiTTeacher
from recipes.small_world.assemble import TEACHER_FOLDER, TOWER_FOLDER
from recipes.small_world.probes import class_accuracy, explained
from recipes.small_world.settings import WorldSettings
from recipes.small_world.vae import pixels_of
from stages.data.synthetic.drawing import draw_video
from stages.data.synthetic.plan import CLASSES, LABELS, plan_videos
from stages.decode.reader import resize_rgb
from stages.frozen.load import load_encoder, load_teacher

BLOCKS = (2, 4, 6, 8)
UNTRAINED = "y* untrained"
_UNTRAINED_SEED = 1
_OVER_TIME = "relationship"
_FIRST_S = (0.0, 6.0)
_APART_S = 1.0
_CHUNK = 64

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Seen:
    """Two frames of every probe video, a second apart, and what the first shows.

    Attributes:
        frames: [V, 2, 112, 112, 3] uint8 RGB.
        labels: [V, 7] int64 as in `LABELS`.
        places: by name [V, K] float64, positions in the first frame.
    """

    frames: Tensor
    labels: Tensor
    places: dict[str, Tensor]


def measure(networks: Path, settings: WorldSettings) -> dict[str, dict[str, float]]:
    """Probe the networks in `networks`.

    Returns:
        By features, then by what is asked of them: held-out accuracy for the tasks (chance 0.25), of `relationship`
        from both frames' features; held-out R^2 for the glyph's row and column (`glyph place`), and for sine and cosine
        of both discs' angles (`disc places`).
    """
    seen = _see(settings)
    return {name: _probe(_compute(features, seen.frames), seen, settings) for name, features in _features(networks)}


def _see(settings: WorldSettings) -> _Seen:
    specs = plan_videos(settings.probe_seed, {"train": settings.probe_videos, "test": settings.probe_held_out})
    rng = np.random.default_rng(settings.probe_seed)
    frames, glyphs, discs = [], [], []
    for spec in specs:
        time_s = rng.uniform(*_FIRST_S)
        images, marks = draw_video(spec.labels, spec.seed, np.array([time_s, time_s + _APART_S]))
        angles = np.array(marks.motion.phase_rad) + np.array(marks.motion.speed_rad_s) * time_s
        frames.append(images)
        glyphs.append(marks.glyph_px)
        discs.append([*np.sin(angles), *np.cos(angles)])
    return _Seen(
        torch.from_numpy(np.stack(frames)),
        torch.tensor([[LABELS[task].index(spec.labels[task]) for task in LABELS] for spec in specs]),
        {"glyph place": torch.tensor(glyphs).double(), "disc places": torch.tensor(np.array(discs))},
    )


def _features(networks: Path) -> Iterator[tuple[str, Features]]:
    """What is probed, by name: frames [N, 112, 112, 3] uint8 -> features [N, D]; each network is loaded when asked."""
    encoder = load_encoder(EncoderConfig(source=str(networks / TOWER_FOLDER)))
    yield "tower mean", lambda frames: encoder(frames)[:, 1:].mean(1)
    yield "tower patches", lambda frames: encoder(frames)[:, 1:].flatten(1)
    source = str(networks / TEACHER_FOLDER)
    teachers = {f"y* block {block}": DiTSettings(source=source, block=block) for block in BLOCKS}
    teachers[UNTRAINED] = DiTSettings(source=source, random_seed=_UNTRAINED_SEED)
    for number, (name, config) in enumerate(teachers.items()):
        teacher = load_teacher(config)
        assert isinstance(teacher, DiTTeacher)
        if number == 0:
            yield "vae latents", _latents_of(teacher)
        yield name, _pooled_by(teacher)


def _latents_of(teacher: DiTTeacher) -> Features:
    return lambda frames: teacher.latents(pixels_of(_resized(frames, teacher.size_px))).flatten(1)


def _pooled_by(teacher: DiTTeacher) -> Features:
    return lambda frames: teacher(_resized(frames, teacher.size_px))


def _resized(frames: Tensor, size_px: int) -> Tensor:
    return torch.from_numpy(np.stack([resize_rgb(frame, (size_px, size_px)) for frame in frames.numpy()]))


@torch.no_grad()
def _compute(features: Features, frames: Tensor) -> Tensor:
    """[V, 2, D] of frames [V, 2, S, S, 3]."""
    computed = torch.cat([features(chunk) for chunk in frames.flatten(0, 1).split(_CHUNK)])
    return computed.unflatten(0, (len(frames), 2))


def _probe(features: Tensor, seen: _Seen, settings: WorldSettings) -> dict[str, float]:
    first, both = features[:, 0], features.flatten(1)
    kept = settings.probe_videos
    scores = {}
    for number, task in enumerate(LABELS):
        rows, labels = both if task == _OVER_TIME else first, seen.labels[:, number]
        scores[task] = class_accuracy(rows[:kept], labels[:kept], rows[kept:], labels[kept:], CLASSES)
    for name, places in seen.places.items():
        scores[name] = explained(first[:kept], places[:kept], first[kept:], places[kept:])
    return {name: round(score, 4) for name, score in scores.items()}
