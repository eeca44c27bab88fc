"""Which synthetic videos there are: their lengths and labels, before any pixel is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.data.manifest import SPLITS, Split

FPS = 10

# The tasks and (part of) the labels of LVU, so that everything written for LVU runs on this set unchanged.
LABELS: dict[str, tuple[str, ...]] = {
    "relationship": ("friend", "ex-boyfriend ex-girlfriend", "husband wife", "boyfriend girlfriend"),
    "way_speaking": ("explain", "confront", "discuss", "teach"),
    "scene": ("office", "hotel", "prison", "restaurant"),
    "director": ("steven", "martin", "ron", "mark"),
    "genre": ("comedy", "action", "romance", "thriller"),
    "writer": ("ian", "stephen", "john", "david"),
    "year": ("0", "3", "6", "8"),
}
CLASSES = 4

# Length in whole seconds, drawn from a range. Windows of 8 s every 8 s give 1 for the first two, then 2 and 3.
_NORMAL, _SHORT, _LONG, _LONGEST = (8, 14), (4, 6), (20, 23), (24, 30)
# One entry per block of CLASSES videos, so that every class gets the same lengths and windows stay balanced.
_LENGTH_CYCLE = (
    *(_NORMAL, _SHORT, _NORMAL, _LONGEST, _NORMAL, _NORMAL),
    *(_NORMAL, _LONG, _NORMAL, _NORMAL, _SHORT, _NORMAL),
)


@dataclass(frozen=True)
class VideoSpec:
    """One video to draw: `labels` by task, `duration_s` whole seconds, `seed` for everything left to chance."""

    id: str
    split: Split
    duration_s: int
    labels: dict[str, str]
    seed: tuple[int, ...]

    @property
    def num_frames(self) -> int:
        return self.duration_s * FPS


def plan_videos(seed: int, videos_per_split: Mapping[str, int]) -> list[VideoSpec]:
    """Return the videos of all splits; the same arguments give the same list.

    A task's labels are shuffled independently of the other tasks, within the videos of one length range, and are
    balanced there exactly when its count divides by 4. A longer split starts with the lengths of a shorter one.
    """
    specs = []
    for number, split in enumerate(SPLITS):
        count = videos_per_split.get(split, 0)
        rng = np.random.default_rng([seed, number])
        ranges = [_LENGTH_CYCLE[index // CLASSES % len(_LENGTH_CYCLE)] for index in range(count)]
        durations = [int(rng.integers(low, high + 1)) for low, high in ranges]
        columns = {task: _balanced(labels, ranges, rng) for task, labels in LABELS.items()}
        specs += [
            VideoSpec(
                id=f"{split}_{index:04d}",
                split=split,
                duration_s=durations[index],
                labels={task: column[index] for task, column in columns.items()},
                seed=(seed, number, index),
            )
            for index in range(count)
        ]
    return specs


def _balanced(labels: tuple[str, ...], ranges: list[tuple[int, int]], rng: np.random.Generator) -> list[str]:
    column = [""] * len(ranges)
    for length in dict.fromkeys(ranges):
        members = [index for index, own in enumerate(ranges) if own == length]
        for place, index in enumerate(rng.permutation(members)):
            column[index] = labels[place % len(labels)]
    return column


def annotations_of(specs: list[VideoSpec], split: str) -> dict[str, dict[str, Any]]:
    """Return one split's annotations in the form of MA-LMM's LVU files, keyed by video id."""
    entries: dict[str, dict[str, Any]] = {}
    for spec in specs:
        if spec.split != split:
            continue
        entry: dict[str, Any] = {"subset": split, "duration": spec.duration_s, "num_frames": spec.num_frames}
        for task, label in spec.labels.items():
            entry[task] = label
            entry[f"{task}_answer"] = f"({'abcd'[LABELS[task].index(label)]})"
        entries[spec.id] = entry
    return entries
