"""Which samples each optimizer step of an epoch sees: a function of the seed and the epoch, so it can be drawn again.

`random` is a plain permutation. `near` is for caches that are larger than the memory which keeps files that were read
(the page cache): the samples of a video, whose frames overlap, come within `NEAR_BATCHES` batches of one another, and
its frames are then read from disk once. The videos are permuted, and the samples within each; this sequence is cut
into blocks of `NEAR_BATCHES` batches; a block's samples are dealt out to its batches one by one, like cards. So each
sample comes once an epoch in a place that is random over epochs, and a video with at most `NEAR_BATCHES` samples in a
block has at most one of them in each batch: batches are no more alike inside than those of a permutation. What is lost
is independence between the batches of one block, which see the same few videos.
"""

from collections.abc import Sequence

import numpy as np

NEAR_BATCHES = 8


class EpochOrder:
    """The batches of each epoch.

    Args:
        near: the video of each sample, to keep a video's samples near one another; None for plain permutations.
    """

    def __init__(self, length: int, batch_size: int, seed: int, *, near: Sequence[str] | None = None) -> None:
        assert near is None or len(near) == length, "each sample has a video"
        self.length = length
        # An incomplete batch is dropped, as in MA-LMM:lavis/runners/runner_base.py:548, unless it is the only one.
        self.batch_size = min(batch_size, length)
        self.seed = seed
        self._videos = None if near is None else np.unique(np.asarray(near), return_inverse=True)[1]

    @property
    def num_batches(self) -> int:
        return self.length // self.batch_size

    def batches(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.length)
        if self._videos is None:
            batches = list(order[: self.num_batches * self.batch_size].reshape(-1, self.batch_size))
        else:
            batches = self._dealt(order, random.permutation(self._videos.max() + 1))
        return [batch.tolist() for batch in batches]

    def _dealt(self, order: np.ndarray, rank_of_video: np.ndarray) -> list[np.ndarray]:
        assert self._videos is not None
        # Stable: within a video, the samples keep the order of their permutation.
        sequence = order[np.argsort(rank_of_video[self._videos[order]], kind="stable")]
        batches = []
        for first in range(0, self.num_batches, NEAR_BATCHES):
            count = min(NEAR_BATCHES, self.num_batches - first)
            block = sequence[first * self.batch_size : (first + count) * self.batch_size]
            batches += list(block.reshape(self.batch_size, count).T)
        return batches
