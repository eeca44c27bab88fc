"""The frozen visual encoder: the InstructBLIP vision tower over uint8 frames (paper section 3.1)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import InstructBlipVisionConfig, InstructBlipVisionModel

from model.frozen import FrozenModule, load_named

# The CLIP constants of InstructBLIP's preprocessor_config.json (FACTS.md C.3), per RGB channel, for pixels in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionEncoder(FrozenModule):
    """Patch features of single frames, final LayerNorm included (frozen here; DESIGN.md 4, E.12).

    Args:
        config: the `vision_config` of an InstructBLIP checkpoint.
    """

    def __init__(self, config: InstructBlipVisionConfig) -> None:
        super().__init__()
        self.vision_model = InstructBlipVisionModel(config)
        self.freeze()

    @classmethod
    def from_tensors(cls, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> "VisionEncoder":
        """Build from a `vision_config` and the checkpoint's tensors; only `vision_model.*` is read.

        Raises:
            ValueError: a tensor is missing or has another shape; the message names it.
        """
        encoder = cls(InstructBlipVisionConfig(**config))
        load_named(encoder.vision_model, tensors, prefix="vision_model.")
        return encoder

    @property
    def size_px(self) -> int:
        """Side of the square input picture in pixels."""
        return int(self.vision_model.config.image_size)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Frames [T, S, S, 3] uint8 RGB -> features [T, P, C] in the network's dtype; P counts the class token."""
        pixels = frames.permute(0, 3, 1, 2).float().div(255.0)
        # Not buffers: those would be rounded with the weights when the network runs in bfloat16.
        mean, std = (torch.tensor(value, device=pixels.device).view(1, 3, 1, 1) for value in (PIXEL_MEAN, PIXEL_STD))
        pixels = (pixels - mean) / std
        features: Tensor = self.vision_model(pixels.to(self.vision_model.dtype)).last_hidden_state
        return features
