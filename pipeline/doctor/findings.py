"""What a check of the doctor reports."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        section: versions, devices, disk, weights, downloads, data or cache.
        status: ok; missing if it is not there; problem if it is there and will not do.
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
