"""What every teacher offers, whichever network it is: frames in, one target y* a frame out (paper section 3.2)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from model.frozen import FrozenModule


class Teacher(FrozenModule, ABC):
    """A frozen network whose pooled hidden states the Q-Former is aligned with.

    Attributes:
        size_px: side of the square picture it takes.
        width: D of its targets.
    """

    size_px: int
    width: int

    @abstractmethod
    def tokens(self, frames: Tensor) -> Tensor:
        """Frames [T, S, S, 3] uint8 RGB -> the hidden states that are pooled, [T, P', D]."""

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Frames [T, S, S, 3] uint8 RGB -> targets y* [T, D] float32: the mean over the tokens."""
        return self.tokens(frames).float().mean(dim=1)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Run in `dtype`, except for parts that need float32."""
        self.to(dtype)
