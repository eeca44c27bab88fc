"""The pictures that the networks learn from: drawn as the data set's videos are, never compressed, of other seeds."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipes.small_world.settings import FrameSettings
from stages.data.synthetic.drawing import SIZE_PX, draw_frames
from stages.data.synthetic.plan import LABELS, plan_videos
from stages.decode.reader import resize_rgb

TEACHER_PX = 64
_TIMES_S = (0.0, 10.0)
_PRINT_EVERY = 1000


@dataclass(frozen=True)
class Frames:
    """Pictures and what they show.

    Attributes:
        images: [N, S, S, 3] uint8 RGB.
        labels: [N, 7] int64, index of each task's label in `LABELS`, in its order of tasks.
    """

    images: Tensor
    labels: Tensor

    def label(self, task: str) -> Tensor:
        """[N] int64, index of the label of one task."""
        return self.labels[:, list(LABELS).index(task)]


def draw(settings: FrameSettings, *, size_px: int) -> Frames:
    """Draw `each` frames at random times of every video of the plan, resized as extraction resizes."""
    specs = plan_videos(settings.world_seed, {"train": settings.videos})
    rng = np.random.default_rng(settings.world_seed)
    images = np.empty((settings.videos * settings.each, size_px, size_px, 3), dtype=np.uint8)
    for number, spec in enumerate(specs):
        times_s = rng.uniform(*_TIMES_S, size=settings.each)
        for place, image in enumerate(draw_frames(spec.labels, spec.seed, times_s)):
            resized = image if size_px == SIZE_PX else resize_rgb(image, (size_px, size_px))
            images[number * settings.each + place] = resized
        if (number + 1) % _PRINT_EVERY == 0:
            print(f"frames: {number + 1} of {len(specs)} videos", flush=True)
    rows = [[LABELS[task].index(spec.labels[task]) for task in LABELS] for spec in specs]
    labels = torch.tensor(rows).repeat_interleave(settings.each, dim=0)
    return Frames(torch.from_numpy(images), labels)
