"""What the openers of vision transformers share: a configuration object of transformers, and weights by name."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from model.pixels import PixelStatistics
from stages.frozen.source import FrozenSource, random_digest
from stages.weights.repository import CheckpointTensors, LoadingReport, Repository


@dataclass(frozen=True)
class OpenedTransformer(ABC):
    """A checkpoint whose configuration was read; its weights are looked for when they are asked for.

    Attributes:
        family: its model_type, or what stands for several.
        size_px: side of its square picture.
        pixels: how it sees them.
        layer: the block, counted from 1, that is read as it is; None: the last, with what follows it.
        random_seed: of weights that are not the checkpoint's.
    """

    repository: Repository
    family: str
    described: Any
    size_px: int
    pixels: PixelStatistics
    layer: int | None
    random_seed: int | None

    @abstractmethod
    def names(self) -> Iterable[str]:
        """What is read from the checkpoint, by the beginnings of the tensors' names: the digest covers just this."""

    @property
    def width(self) -> int:
        return int(self.described.hidden_size)

    @property
    def patches(self) -> int:
        return int(self.size_px // self.described.patch_size) ** 2

    @property
    def blocks(self) -> range:
        """Indices of the blocks that are read."""
        return range(self.layer or self.described.num_hidden_layers)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The checkpoint's tensors by name, unread; none where weights are random."""
        return {} if self.random_seed is not None else self.repository.tensors()

    def describe(self) -> FrozenSource:
        """Input size, digest of what is read, and what the checkpoint states."""
        if isinstance(self.tensors, CheckpointTensors):
            digest = self.tensors.digest(self.names())
        else:
            assert self.random_seed is not None
            digest = random_digest(self.random_seed, self.described.to_dict())
        facts = {"family": self.family, "pixels": str(self.pixels)}
        return FrozenSource(self.size_px, digest, {**facts}, self.loading())

    def loading(self) -> tuple[LoadingReport, ...]:
        return (self.tensors.loading(),) if isinstance(self.tensors, CheckpointTensors) else ()
