"""How much memory this process may still take: of a GPU, or of the machine within every limit that is set for it."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

# The rest is for holes between tensors and what the libraries take for themselves.
_USABLE = 0.9
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that tensors on the device may still take.

    On a GPU what is free, with what torch keeps for later. On a CPU the least of what the system has available, what
    the control groups of this process leave it, and what its limits of address space and data do.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return max(0, min(_host_limits(_PROC, _CGROUPS)))


def usable_memory(device: torch.device) -> int:
    """`free_memory` less a margin for what no arithmetic sees; on a CPU, shared by the processes that train here."""
    share = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return usable_of(free_memory(device)) // share


def usable_of(free: int) -> int:
    """So many free bytes less that margin."""
    return int(_USABLE * free)


def _host_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each limit leaves, in bytes."""
    if (proc / "meminfo").is_file():
        yield 1024 * _field(proc / "meminfo", "MemAvailable:")
    else:  # not Linux: half of the memory is a guess
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if (proc / "self" / "cgroup").is_file():
        yield from _group_limits((proc / "self" / "cgroup").read_text(encoding="utf-8"), cgroups)
    for limit, taken in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft, _hard = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - 1024 * _field(proc / "self" / "status", taken)


def _group_limits(membership: str, root: Path) -> Iterator[int]:
    """What the groups of /proc/self/cgroup, and those above them, leave; version 1 and 2 of control groups."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, usage, inactive = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        group = PurePosixPath(path)
        # In a container the path may be that of the host: the folder itself is then the group.
        for part in (group, *group.parents):
            place = folder / part.relative_to("/")
            if (place / limit).is_file() and (most := (place / limit).read_text(encoding="ascii").strip()) != "max":
                # Pages of files that nobody uses are given up before a limit is felt.
                given_up = _field(place / "memory.stat", inactive)
                yield int(most) - int((place / usage).read_text(encoding="ascii")) + given_up


def _field(path: Path, name: str) -> int:
    """The number behind a name in a file with one per line; 0 if it is not there."""
    for line in path.read_text(encoding="ascii").splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0


def data_held() -> int:
    """Bytes of this process that count towards `limit_memory`; 0 where the system does not say."""
    status = _PROC / "self" / "status"
    return 1024 * _field(status, "VmData:") if status.is_file() else 0


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
