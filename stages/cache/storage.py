"""Storage types: how features `[T, P, C]` become stored arrays and come back.

A storage type may spread the features over several arrays: `features` itself, one row per frame, and `per_video` arrays
that belong to the whole video (the scales of a quantised type). Writer, reader and verification handle both kinds by
the commit record, so another type is one more entry in `STORAGE_TYPES`.

numpy has no bfloat16: such features are stored and returned as their 16 bits, in uint16; `widen` gives the numbers.
int8 is returned as bfloat16, too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from stages.cache.files.errors import CacheWriteError
from stages.errors import UserError

STORAGE_FIELD = "storage"
"""The fingerprint field that names a cache's storage type."""

_BLOCK_FRAMES = 10
_LARGEST_BFLOAT16 = float(np.array(0x7F7F_0000, np.uint32).view(np.float32))
# Symmetric, so that zero is exact; -128 is left to the fill value of chunks that were never written.
_LARGEST_INT8 = 127
# Bits of a float without its sign, per item size: as integers they order like magnitudes, with inf and NaN on top.
_MAGNITUDE = {2: (np.uint16, 0x7FFF), 4: (np.uint32, 0x7FFF_FFFF)}


Stored = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class StorageType:
    """A way to store features; this one as they are, in one array of the type that numpy calls `name`.

    Attributes:
        name: the value of the fingerprint's storage field.
        largest: greater magnitudes are refused, never made infinite.
        per_video: names of the arrays that are read whole, whatever frames are asked for.
    """

    name: str
    largest: float
    per_video: tuple[str, ...] = ()

    def encode(
        self, features: np.ndarray, *, video: str, times_s: np.ndarray, kept: Stored | None = None
    ) -> dict[str, np.ndarray]:
        """Turn features `[T, P, C]` (float16 or float32) into stored arrays by name; CacheWriteError if they cannot.

        With `kept`, the stored arrays of K older frames, the result holds those frames first: `[K + T, P, C]`.
        """
        refuse_unstorable(features, largest=self.largest, name="features", video=video, times_s=times_s)
        return self._stored(features, kept)

    def decode(self, stored: Stored) -> np.ndarray:
        """Turn the stored arrays of some frames into features `[T, P, C]`."""
        return stored["features"]

    def _stored(self, features: np.ndarray, kept: Stored | None) -> dict[str, np.ndarray]:
        return {"features": _after(kept, features.astype(self.name, copy=False))}


class _BFloat16(StorageType):
    """Rounded to nearest even: float32's range with 8 bits of precision; stored and returned as its bits, in uint16."""

    def _stored(self, features: np.ndarray, kept: Stored | None) -> dict[str, np.ndarray]:
        bits = np.empty(features.shape, np.uint16)
        for block in _blocks(len(features)):
            bits[block] = _bfloat16_bits(np.ascontiguousarray(features[block], dtype=np.float32))
        return {"features": _after(kept, bits)}


class _Int8(StorageType):
    """Integers of 8 bits, times one float32 scale per channel of the video: `scales [C]`, a channel's peak / 127.

    One scale per token instead would be set by the outlier channels of vision transformers and cost all others most of
    their precision. A stored value is off by half a step of its channel at most. Frames that are added later keep the
    scales, but for channels in which they exceed the old peak: there the old frames are rounded once more, to the wider
    step.
    """

    def _stored(self, features: np.ndarray, kept: Stored | None) -> dict[str, np.ndarray]:
        scales = _channel_peaks(features) / np.float32(_LARGEST_INT8)
        if kept is not None:
            scales = np.maximum(scales, kept["scales"])
        # A channel that is zero throughout has scale 0; any divisor gives it zeros.
        steps = np.where(scales > 0, scales, np.float32(1))
        quantised = np.empty(features.shape, np.int8)
        for block in _blocks(len(features)):
            # The quotient of a peak and its own scale may exceed 127 by a rounding.
            quantised[block] = np.clip(np.rint(features[block] / steps), -_LARGEST_INT8, _LARGEST_INT8)
        if kept is not None:
            kept = {"features": _on_wider_steps(kept["features"], kept["scales"], steps)}
        return {"features": _after(kept, quantised), "scales": scales}

    def decode(self, stored: Stored) -> np.ndarray:
        # bfloat16's bits, which numpy makes four times as fast as float16. Both roundings together are off by less than
        # a step of the channel.
        bits = np.empty(stored["features"].shape, np.uint16)
        for frame, quantised in enumerate(stored["features"]):
            bits[frame] = _bfloat16_bits(quantised * stored["scales"])
        return bits


STORAGE_TYPES: dict[str, StorageType] = {
    kind.name: kind
    for kind in (
        *(StorageType(name, float(np.finfo(name).max)) for name in ("float16", "float32")),
        _BFloat16("bfloat16", _LARGEST_BFLOAT16),
        _Int8("int8", _LARGEST_BFLOAT16, ("scales",)),
    )
}


def widen(features: np.ndarray) -> np.ndarray:
    """Return features as the cache gives them as numbers that numpy knows: bfloat16's bits become float32."""
    return (features.astype(np.uint32) << 16).view(np.float32) if features.dtype == np.uint16 else features


def storage_type(name: object) -> StorageType:
    """Return the storage type called `name`; UserError with the names there are."""
    if isinstance(name, str) and name in STORAGE_TYPES:
        return STORAGE_TYPES[name]
    raise UserError(
        f"unknown storage type (fingerprint field {STORAGE_FIELD!r})", received=name, allowed=", ".join(STORAGE_TYPES)
    )


def _after(kept: Stored | None, rows: np.ndarray) -> np.ndarray:
    return rows if kept is None else np.concatenate([kept["features"], rows])


def _bfloat16_bits(wide: np.ndarray) -> np.ndarray:
    """Round finite, contiguous float32 to the nearest bfloat16; its 16 bits, in uint32."""
    bits = wide.view(np.uint32)
    # Half a unit of the last kept bit, a hair less for even numbers, which then stay even on a tie.
    return (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16


def _blocks(num_frames: int) -> Iterator[slice]:
    """Cut frames into blocks that fit a processor's cache better than a whole video of float32 would."""
    return (slice(start, start + _BLOCK_FRAMES) for start in range(0, num_frames, _BLOCK_FRAMES))


def _channel_peaks(features: np.ndarray) -> np.ndarray:
    """The largest magnitude of each channel, `[C]` float32."""
    peaks = np.zeros(features.shape[2], np.float32)
    for block in _blocks(len(features)):
        np.maximum(peaks, np.abs(features[block]).max(axis=(0, 1)), out=peaks)
    return peaks


def _on_wider_steps(quantised: np.ndarray, scales: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Round stored integers to wider steps in the channels whose step grew; all others stay as they are."""
    grown = np.flatnonzero(steps > np.where(scales > 0, scales, np.float32(1)))
    moved = quantised.copy()
    moved[:, :, grown] = np.rint(quantised[:, :, grown] * (scales[grown] / steps[grown]))
    return moved


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
