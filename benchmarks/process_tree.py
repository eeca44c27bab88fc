"""Which processes a process has started, as /proc tells."""

from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and those that they started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def command_line(pid: int) -> str:
    """Its words, with spaces between them; OSError when it has ended."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
