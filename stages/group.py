"""The processes that train one model together, as the training step sees them."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """What a step has to agree upon with the other processes; each of them has its own part of every batch."""

    rank: int
    size: int

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""

    def gather(self, value: Tensor) -> Tensor:
        """Everybody's rows [B, ...], in the order of ranks."""

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the sum of all gradients."""


class Alone:
    """A group of one process."""

    rank = 0
    size = 1

    def sum(self, value: Tensor) -> Tensor:
        """See `Group.sum`."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """See `Group.gather`."""
        return value

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """See `Group.sum_gradients`."""
