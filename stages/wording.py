"""Counts, names and times as every message writes them."""

from collections.abc import Sequence

GIB = 2**30
"""Bytes of one unit of the settings that are given in GiB."""

# So many names stand in a line.
_NAMED = 5


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """`1 video`, `2 videos`, `1,234 videos`; `plural` where an s does not make it, as in `file is`, `files are`."""
    shown = f"{number:,g}" if isinstance(number, float) else f"{number:,}"
    return f"{shown} {noun if number == 1 else plural or f'{noun}s'}"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds as `1:02:03`; None is unknown."""
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def rate(per_s: float, noun: str, plural: str | None = None) -> str:
    """Three digits of so many per second, or per minute or hour where that would be less than one."""
    each, name = next(((each, name) for each, name in ((1, "s"), (60, "min")) if per_s * each >= 1), (3600, "h"))
    value = per_s * each
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {plural or f'{noun}s'}/{name}"


def first_names(names: Sequence[str], separator: str = ", ") -> str:
    """The first of many names, and how many more there are."""
    more = f"{separator}and {len(names) - _NAMED} more (all with --json)" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more


def byte_size(count: float) -> str:
    """`1.2 GB`, in units of 1000."""
    return _scaled(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def rough_time(seconds: float) -> str:
    """`1.2 h`: one number and its unit."""
    return _scaled(seconds, (("d", 86400.0), ("h", 3600.0), ("min", 60.0)), "s")


def large_count(count: float) -> str:
    """`1.2 T`: one number and what it is to be multiplied with (E, P, T, G, M or k, each a thousand of the next)."""
    return _scaled(count, (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)), "").rstrip()


def _scaled(value: float, units: Sequence[tuple[str, float]], smallest: str) -> str:
    name, size = next(((name, size) for name, size in units if value >= size), (smallest, 1.0))
    return f"{value / size:,.1f} {name}"
