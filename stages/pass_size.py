"""How many frames go through the frozen networks at once: as many as the memory holds, as long as more of them pay.

On a GPU this is tried, with passes of the real networks. On a CPU the last bits of a feature depend on how many frames
share its pass, so nothing that varies from start to start may decide there: the number follows from the machine's
memory and from what one frame takes.
"""

import math
import os
import resource
from collections.abc import Callable
from pathlib import Path

from stages.config import ExtractConfig

# More frames at once are hardly faster on a CPU, and fewer of them are wasted on filling up a pass.
CPU_FRAMES = 8  # a power of two: threads share other numbers unevenly, and then a frame's place in the pass matters
_MOST_FRAMES = 256

# Twice the frames must make a frame cheaper by so much to be worth their memory and their filling up.
_LEAST_GAIN = 0.05

# Part of a CPU's memory that networks and frames may take: the decode children need some, and so do others.
_CPU_SHARE = 0.6


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


def cpu_pass(run_one: Callable[[], object]) -> int:
    """Frames per pass on a CPU; 0 where not even one fits.

    Args:
        run_one: runs a pass of one frame, whose memory is measured.
    """
    per_frame = peak_bytes(run_one)
    room = memory_room_bytes()
    return largest_pass(lambda frames: frames * per_frame <= room, most=CPU_FRAMES)


def set_pass(config: ExtractConfig, *, on_gpu: bool) -> int | None:
    """Frames per pass as set, on a CPU rounded down to a power of two; None where it is to be found."""
    if config.batch_size == "auto":
        return None
    return config.batch_size if on_gpu else 2 ** int(math.log2(config.batch_size))


def peak_bytes(work: Callable[[], object]) -> int:
    """By how much `work` raised this process's peak of resident memory; 0 where the system does not tell (Linux does).

    Memory that was free in the process already is not seen.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = _status_bytes("VmRSS")
    except OSError:
        work()
        return 0
    work()
    return max(0, _status_bytes("VmHWM") - before)


def memory_room_bytes() -> int:
    """Bytes that this process may still take: a share of the machine's or container's memory, less what it has.

    What others take at the moment is left out on purpose: it is another amount at each start.
    """
    limits = [_cgroup_limit(), _total_bytes()]
    room = int(_CPU_SHARE * min(limit for limit in limits if limit is not None)) - _status_bytes("VmRSS")
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        room = min(room, int(_CPU_SHARE * (address_space - _status_bytes("VmSize"))))
    return room


def _total_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limit() -> int | None:
    """The container's limit, where there is one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # "max" is no number: no limit
            continue
    return None


def _status_bytes(name: str) -> int:
    """A line of this process's status in bytes; 0 where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
