"""Which frame is shown at which time: the same rule for every decoder."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from stages.decode.frames import DecodeError, FrameRequest

# Containers round timestamps to their time base, so a frame may carry a time up to half a tick after its true one.
# The cap keeps coarse time bases (AVI: one tick = one frame, exact) from returning a frame before it is shown.
_MAX_ROUNDING_S = 0.0005


@dataclass(frozen=True)
class Timeline:
    """The frames that a video shows, in order.

    `ticks` [F] int64 are the frames' timestamps in units of `time_base` seconds, ascending; time 0 is the first of
    them. `last_duration_ticks` is how long the last frame stays.
    """

    ticks: np.ndarray
    time_base: Fraction
    last_duration_ticks: int

    @property
    def shown_s(self) -> np.ndarray:
        """[F] float64: when each frame appears, in seconds after the first."""
        relative = (self.ticks - self.ticks[0]) * self.time_base.numerator
        return relative / self.time_base.denominator

    @property
    def end_s(self) -> float:
        """When the last frame ends, in seconds after the first frame appears."""
        return float((int(self.ticks[-1] - self.ticks[0]) + self.last_duration_ticks) * self.time_base)

    @property
    def rounding_s(self) -> float:
        """How much before its timestamp a frame counts as shown, in seconds."""
        return min(float(self.time_base) / 2, _MAX_ROUNDING_S)

    def choose(self, request: FrameRequest) -> np.ndarray:
        """Return [T] int64: for each asked time the index of the last frame that has appeared by then.

        Raises `DecodeError` ("out_of_range") for a time before 0 or after `end_s` by more than the tolerance.
        """
        shown_s = self.shown_s
        for asked_s in (request.times_s[0], request.times_s[-1]):
            if not -request.tolerance_s <= asked_s <= self.end_s + request.tolerance_s:
                raise DecodeError(
                    "out_of_range",
                    f"asked for the frame at {asked_s:.3f} s, but the last frame is shown at {shown_s[-1]:.3f} s and "
                    f"ends at {self.end_s:.3f} s (tolerance {request.tolerance_s:g} s): {request.path}, "
                    f"decoder {request.decoder}",
                )
        indices = np.searchsorted(shown_s, request.times_s + self.rounding_s, side="right") - 1
        return np.maximum(indices, 0)
