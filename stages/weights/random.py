"""Random weights by name, in the place of a checkpoint's: a file of shapes, from which tensors are made when asked for.

They take no memory and no time to speak of: every tensor is a view of one small buffer, of which its rows are pieces
that begin one number further on. Networks that are filled with them compute what they do with any weights: finite
numbers, at the usual speed.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from stages.errors import UserError

RANDOM_FILE = "random_weights.json"
"""Name of the file: a JSON object of each tensor's shape by its name. A checkpoint has it in the place of weights."""

_SEED, _STD = 0, 0.02
# Tensors of one shape begin at different places.
_STARTS = 4096


class RandomTensors(Mapping[str, Tensor]):
    """Tensors of the shapes in a `RANDOM_FILE`, float32, the same at every reading.

    Weights of norms are ones, all else is normal with a small deviation. They are views that overlap: to be copied
    from, never written to.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._shapes: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
            longest = max(_reach(shape) for shape in self._shapes.values())
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError("not a file of shapes", where=path, hint="remove it") from error
        generator = torch.Generator().manual_seed(_SEED)
        self._buffer = torch.randn(longest + _STARTS, generator=generator) * _STD

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(1).expand(shape)
        start = self._buffer[zlib.crc32(name.encode()) % _STARTS :]
        inner = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        return start.as_strided(shape, [1, *inner][: len(shape)])

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _reach(shape: list[int]) -> int:
    """How many numbers of the buffer a tensor is made of."""
    return shape[0] + math.prod(shape[1:]) if shape else 1
