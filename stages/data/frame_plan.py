"""Which frames of which video are needed, each once, however many samples share them."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from stages.data.manifest import Manifest
from stages.shard import Shard


@dataclass(frozen=True)
class FramePlan:
    """The frames to decode and encode: per video id, sorted distinct times in seconds, `[T]` float64."""

    times_s: dict[str, np.ndarray]

    @property
    def num_frames(self) -> int:
        return sum(len(times) for times in self.times_s.values())

    @property
    def num_videos(self) -> int:
        """Videos with at least one frame."""
        return len(self.times_s)

    def of_shard(self, shard: Shard) -> "FramePlan":
        """The videos of one shard; all shards have about as many frames."""
        own = shard.own_keys({video: len(times) for video, times in self.times_s.items()})
        return FramePlan({video: times for video, times in self.times_s.items() if video in own})


def plan_frames(manifest: Manifest) -> FramePlan:
    """Return, per video, the sorted union of the frame times that the manifest's samples may ask for.

    Times are compared exactly: `Sample.planned_times_s` yields the same float for the same frame index.
    """
    wanted: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for sample in manifest.samples:
        wanted[sample.video].append(sample.planned_times_s())
    return FramePlan({video: np.unique(np.concatenate(times)) for video, times in wanted.items()})
