"""How much memory a process may still take on this machine."""

import os
import resource
import sys
from pathlib import Path

_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_ROOT = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that can be had without swapping: what the system has free, and what limits of this process leave."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return min([free, *_left_in_cgroups()] + ([] if soft == resource.RLIM_INFINITY else [soft]))


def limit_memory(num_bytes: int) -> None:
    """Have allocations beyond so many bytes fail in this process, instead of the system end it or another one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    least = min(one for one in (num_bytes, soft, hard) if one != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (least, hard))


def peak_memory() -> int:
    """Most bytes of memory that this process has held so far.

    Its children are not counted: the kernel has a child begin with its parent's peak.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _left_in_cgroups() -> list[int]:
    """What each limit of the process's control group leaves."""
    left = []
    for limit, used in _CGROUPS:
        texts = [(_ROOT / name).read_text().strip() for name in (limit, used) if (_ROOT / name).is_file()]
        if len(texts) == 2 and all(map(str.isdigit, texts)):
            left.append(int(texts[0]) - int(texts[1]))
    return left
