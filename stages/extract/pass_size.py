"""How many frames go through the frozen networks at once: as many as the memory holds, as long as more of them pay.

On a GPU this is tried, with passes of the real networks. On a CPU the last bits of a feature depend on how many frames
share its pass, so nothing that varies from start to start may decide there: it is a constant, and halved where a pass
does not fit.
"""

import math
from collections.abc import Callable

from stages.config import ExtractConfig

# More frames at once are hardly faster on a CPU, and fewer of them are wasted on filling up a pass.
CPU_FRAMES = 8  # a power of two: threads share other numbers unevenly, and then a frame's place in the pass matters
_MOST_FRAMES = 256

# Twice the frames must make a frame cheaper by so much to be worth their memory and their filling up.
_LEAST_GAIN = 0.05


def largest_pass(fits: Callable[[int], bool], *, most: int) -> int:
    """Double from one frame up to `most` for as long as `fits` says so; 0 where not even one frame fits."""
    frames = 0
    while (more := max(1, 2 * frames)) <= most and fits(more):
        frames = more
    return frames


def while_it_pays(seconds_of: Callable[[int], float | None]) -> Callable[[int], bool]:
    """Make a `fits` for `largest_pass` of trials: more frames must fit, and must make each of them cheaper.

    Args:
        seconds_of: runs a pass of so many frames; its seconds, or None where the memory did not hold it.
    """
    best_s = math.inf

    def fits(frames: int) -> bool:
        nonlocal best_s
        seconds = seconds_of(frames)
        if seconds is None or seconds / frames > best_s * (1 - _LEAST_GAIN):
            return False
        best_s = seconds / frames
        return True

    return fits


def gpu_pass(seconds_of: Callable[[int], float | None]) -> int:
    """Frames per pass on a GPU, by trial; 0 where not even one fits."""
    return largest_pass(while_it_pays(seconds_of), most=_MOST_FRAMES)


def set_pass(config: ExtractConfig, *, on_gpu: bool) -> int | None:
    """Frames per pass as set, on a CPU rounded down to a power of two; None where a GPU is to find it by trial."""
    if config.batch_size == "auto":
        return None if on_gpu else CPU_FRAMES
    return config.batch_size if on_gpu else 2 ** int(math.log2(config.batch_size))
