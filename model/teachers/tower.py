"""A third family of teachers, vision towers: does a diffusion network teach more than a visual encoder itself?"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, InstructBlipVisionConfig

from model.config import TowerSettings
from model.pixels import PixelStatistics
from model.teachers.base import Teacher
from model.vision import VisionEncoder


class TowerTeacher(Teacher):
    """Frames to targets y*: the tokens of a visual encoder, with its own pixels and layers, pooled.

    Args:
        vision_config: of the tower; its class decides which is built.
        tensors: the checkpoint's tensors by name, none for a tower with random weights.
        prefix: of their names, as in `VisionEncoder`.
        pixels: how the tower was trained to see its pixels.

    Raises:
        ValueError: the tower has fewer blocks, or a tensor is missing or misshapen.
    """

    def __init__(
        self,
        config: TowerSettings,
        *,
        vision_config: InstructBlipVisionConfig | CLIPVisionConfig,
        tensors: Mapping[str, Tensor],
        prefix: str,
        pixels: PixelStatistics,
    ) -> None:
        super().__init__()
        config.require_fits(vision_config.num_hidden_layers)
        self.pooling = config.pooling
        self.encoder = VisionEncoder(
            config.as_encoder(),
            vision_config=vision_config,
            tensors=tensors,
            prefix=prefix,
            pixels=pixels,
            random_seed=config.random_seed,
        )
        self.size_px, self.width = self.encoder.size_px, self.encoder.width
        self.freeze()

    @torch.no_grad()
    def tokens(self, frames: Tensor) -> Tensor:
        """Frames [T, S, S, 3] uint8 RGB -> patch tokens [T, P - 1, D], or the class token [T, 1, D]."""
        features: Tensor = self.encoder(frames)
        return features[:, :1] if self.pooling == "class" else features[:, 1:]
