"""One of N processes that divide the videos of a plan among themselves without hearing of one another."""

import heapq
import re
from collections.abc import Mapping
from dataclasses import dataclass

from stages.errors import UserError

_FORM = re.compile(r"([0-9]+)/([0-9]+)")


@dataclass(frozen=True)
class Shard:
    """Number `index` of `count` shards, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "I/N"; UserError unless 1 <= I <= N."""
        found = _FORM.fullmatch(text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(
                "this is no shard of a plan",
                where="--shard",
                received=text,
                allowed="I/N with 1 <= I <= N, as in 3/8",
                hint="count from 1: --array=1-8, not 0-7",
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def own_keys(self, sizes: Mapping[str, int]) -> set[str]:
        """The keys that are this shard's: those of all shards are disjoint, all keys together, and of like total size.

        The largest goes first, each to the shard that has least so far; so every shard comes to the same division,
        whatever the order of `sizes`.
        """
        totals = [(0, index) for index in range(1, self.count + 1)]
        own = set()
        for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
            total, index = totals[0]
            heapq.heapreplace(totals, (total + sizes[key], index))
            if index == self.index:
                own.add(key)
        return own
