"""What a network of transformers expects of its pixels: values in [0, 1], then normalised per RGB channel."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation of each RGB channel, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalise(self, frames: Tensor) -> Tensor:
        """Frames [T, S, S, 3] uint8 RGB -> pixels [T, 3, S, S] float32."""
        pixels = frames.permute(0, 3, 1, 2).float().div(255.0)
        # Not buffers of the networks: those would be rounded with the weights when a network runs in bfloat16.
        mean, std = (torch.tensor(value, device=pixels.device).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return (pixels - mean) / std

    def __str__(self) -> str:
        return f"mean {self.mean}, std {self.std}"


# Of InstructBLIP's and CLIP's preprocessor_config.json, and MA-LMM:lavis/processors/blip_processors.py:23-26.
CLIP_PIXELS = PixelStatistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Of DINOv2's (facebook/dinov2-base).
IMAGENET_PIXELS = PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
