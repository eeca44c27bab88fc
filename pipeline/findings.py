"""What a check of the doctor reports, and sentences that several commands share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stages.cache.source import Changes

# So many names stand in a line.
_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        section: versions, devices, disk, weights, data or cache.
        item: what was looked at.
        status: ok; missing if it is not there; problem if it is there and will not do.
        detail: what was found.
        fix: what to do, as an imperative or a command; None if the status is ok.
        names: everything that `detail` counts and names the first of.
        needed: whether `doctor --strict` asks for it: not for what the next command makes, like a cache, nor for what
            only makes results differ from published ones.
    """

    section: str
    item: str
    status: Literal["ok", "missing", "problem"]
    detail: str
    fix: str | None = None
    names: tuple[str, ...] = ()
    needed: bool = True

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (self.fix is None), self


def first_names(names: Sequence[str], separator: str = ", ") -> str:
    """The first of many names, and how many more there are."""
    more = f"{separator}and {len(names) - _NAMED} more (all with --json)" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more


def outdated_sentence(changes: Changes) -> str:
    """How many videos have, or may have, other files than when they were extracted, and the first of them."""
    parts = []
    for what, found in (
        ("have changed since their extraction", changes.changed),
        ("may have changed (same size, another time or version)", changes.unsure),
    ):
        if found:
            named = [f"{video}: {difference}" for video, difference in found.items()]
            parts.append(f"video files that {what}: {len(found)} ({first_names(named, '; ')})")
    return ", ".join(parts)


def damaged_sentence(remarks: Mapping[str, str]) -> str:
    """How many videos are from damaged files, by what is known of the damage, and the first of them."""
    named = [f"{video}: {remark}" for video, remark in remarks.items()]
    return f"damaged video files, used as far as they are whole: {len(named)} ({first_names(named, '; ')})"
