"""Storage types: how features `[T, P, C]` become stored arrays and come back.

A storage type may spread the features over several arrays: `features` itself, one row per frame, and `per_video` arrays
that belong to the whole video (the scales of a quantised type). Writer, reader and verification handle both kinds by
the commit record alone, so another type is one more entry in `STORAGE_TYPES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from stages.cache.errors import CacheWriteError
from stages.errors import UserError

STORAGE_FIELD = "storage"
"""The fingerprint field that names a cache's storage type."""

_BLOCK_FRAMES = 10
# Bits of a float without its sign, per item size: as integers they order like magnitudes, with inf and NaN on top.
_MAGNITUDE = {2: (np.uint16, 0x7FFF), 4: (np.uint32, 0x7FFF_FFFF)}


class StorageType(Protocol):
    """What the cache needs to know of a way to store features."""

    @property
    def name(self) -> str:
        """The value of the fingerprint's storage field."""

    @property
    def per_video(self) -> tuple[str, ...]:
        """Names of the arrays that are read whole, whatever frames are asked for."""

    def encode(self, features: np.ndarray, *, video: str, times_s: np.ndarray) -> dict[str, np.ndarray]:
        """Turn features `[T, P, C]` (float16 or float32) into stored arrays by name; CacheWriteError if they cannot."""

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """Turn the stored arrays of some frames into features `[T, P, C]`."""


@dataclass(frozen=True)
class FloatStorage:
    """Plain floats: one array, in the type that numpy calls `name`."""

    name: str
    per_video: ClassVar[tuple[str, ...]] = ()

    def encode(self, features: np.ndarray, *, video: str, times_s: np.ndarray) -> dict[str, np.ndarray]:
        """See `StorageType.encode`; magnitudes beyond the type's largest number are refused, never made infinite."""
        largest = float(np.finfo(self.name).max)
        refuse_unstorable(features, largest=largest, name="features", video=video, times_s=times_s)
        return {"features": features.astype(self.name, copy=False)}

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `StorageType.decode`; the stored type is kept."""
        return stored["features"]


STORAGE_TYPES: dict[str, StorageType] = {kind.name: kind for kind in (FloatStorage("float16"), FloatStorage("float32"))}


def storage_type(name: object) -> StorageType:
    """Return the storage type called `name`; UserError with the names there are."""
    if isinstance(name, str) and name in STORAGE_TYPES:
        return STORAGE_TYPES[name]
    raise UserError(
        f"unknown storage type (fingerprint field {STORAGE_FIELD!r})", received=name, allowed=", ".join(STORAGE_TYPES)
    )


def refuse_unstorable(array: np.ndarray, *, largest: float, name: str, video: str, times_s: np.ndarray) -> None:
    """Raise CacheWriteError naming video, array and frame time if `array` `[T, ...]` holds NaN or exceeds `largest`."""
    for start in range(0, len(array), _BLOCK_FRAMES):
        block = np.ascontiguousarray(array[start : start + _BLOCK_FRAMES])
        if _peak(block) <= largest:
            continue
        peaks = [_peak(frame) for frame in block]
        at = next(index for index, peak in enumerate(peaks) if not peak <= largest)
        finite = np.isfinite(peaks[at])
        what = f"a magnitude of {peaks[at]:g}, over the largest storable {largest:g}" if finite else "NaN or infinity"
        raise CacheWriteError(f"video {video!r}: {name} of the frame at {times_s[start + at]:.6f} s hold {what}")


def _peak(block: np.ndarray) -> float:
    """Return the largest magnitude in a contiguous float block, NaN when it holds one.

    On bits, because numpy's own `isfinite` and `max` take about ten times as long on float16.
    """
    integer, mask = _MAGNITUDE[block.itemsize]
    return float((block.view(integer) & mask).max().astype(integer).view(block.dtype))
