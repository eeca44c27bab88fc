"""The processes that train one model together, as the training step sees them."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """What a step has to agree upon with the other processes; each of them has its own part of every batch.

    Every process calls the same methods in the same order; a call returns when all have made it.
    """

    rank: int
    size: int

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""

    def texts(self, own: Sequence[str]) -> list[str]:
        """Everybody's texts, in the order of ranks."""

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], losses: Tensor) -> Tensor:
        """Give every process the sum of all gradients, and return that of `losses` [K] float32, on the same device."""


class SingleProcess:
    """A group of one process."""

    rank = 0
    size = 1

    def sum(self, value: Tensor) -> Tensor:
        return value

    def texts(self, own: Sequence[str]) -> list[str]:
        return list(own)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], losses: Tensor) -> Tensor:  # noqa: ARG002
        """See `Group.sum_gradients`."""
        return losses


class ProcessGroup:
    """The processes of torch's default process group, which must be there.

    Args:
        device: of the model; where tensors have to be for the group's backend.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # What lies in the CPU's memory is summed there: through a GPU it would wait for all of the GPU's work.
        self._of_cpus = None if device.type == "cpu" else dist.new_group(backend="gloo")

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total, group=self._of_cpus if value.device.type == "cpu" else None)
        return total

    def texts(self, own: Sequence[str]) -> list[str]:
        found: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, list(own))
        return [text for part in found for text in part]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], losses: Tensor) -> Tensor:
        """See `Group.sum_gradients`; which parameters have a gradient is the same everywhere.

        All go in one tensor. Activations are gone by now, so that its memory does not add to the step's largest.
        """
        tensors = [losses.detach(), *(p.grad for p in parameters if p.grad is not None)]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        total, *gradients = flat.split([tensor.numel() for tensor in tensors])
        for tensor, gradient in zip(tensors[1:], gradients, strict=True):
            tensor.copy_(gradient.view_as(tensor))
        return total
