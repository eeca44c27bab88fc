"""The processes that train one model together, as the training step sees them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Gradients are summed in pieces of this size, so that their copies take little memory beside them.
_BUCKET_BYTES = 2**26


class Group(Protocol):
    """What a step has to agree upon with the other processes; each of them has its own part of every batch.

    Every process calls the same methods in the same order; a call returns when all have made it.
    """

    rank: int
    size: int

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""

    def gather(self, value: Tensor) -> Tensor:
        """Everybody's rows [B, ...], in the order of ranks; all have equally many."""

    def texts(self, own: Sequence[str]) -> list[str]:
        """Everybody's texts, in the order of ranks."""

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the sum of all gradients."""


class Alone:
    """A group of one process."""

    rank = 0
    size = 1

    def sum(self, value: Tensor) -> Tensor:
        return value

    def gather(self, value: Tensor) -> Tensor:
        return value

    def texts(self, own: Sequence[str]) -> list[str]:
        return list(own)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """See `Group.sum_gradients`."""


class Together:
    """The processes of torch's default process group, which must be there.

    Args:
        device: where tensors have to be for its backend.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def gather(self, value: Tensor) -> Tensor:
        own = value.detach().to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.cat(parts).to(value.device)

    def texts(self, own: Sequence[str]) -> list[str]:
        found: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, list(own))
        return [text for part in found for text in part]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """See `Group.sum_gradients`; which parameters have a gradient is the same everywhere."""
        for gradients in _buckets(p.grad for p in parameters if p.grad is not None):
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list of tensors into pieces of about equal bytes."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(one.nbytes for one in bucket) >= _BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
