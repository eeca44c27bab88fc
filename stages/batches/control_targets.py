"""A control for the distillation: every frame is given the teacher's vector of another video's frame."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from stages.errors import UserError

if TYPE_CHECKING:
    from stages.cache.feature_cache import FeatureCache


class ShuffledTargets:
    """Whose y* each frame gets, drawn once from a seed and the same in every epoch.

    The videos stand in a ring in random order, and each borrows from the next: no video gets its own vectors, and over
    all of them the vectors are those of the teacher. Its frames borrow in random order, in turn where the other video
    has fewer, so that nothing of what moves is left either.

    Raises:
        UserError: a single video has nobody to borrow from.
    """

    def __init__(self, cache: "FeatureCache", videos: Iterable[str], *, seed: int) -> None:
        ring = [str(video) for video in np.random.default_rng(seed).permutation(sorted(set(videos)))]
        if len(ring) < 2:
            raise UserError(
                "train.targets=shuffled exchanges the targets of different videos, and the training split has one",
                hint="train on more videos, or with train.targets=own",
            )
        self._cache, self._seed = cache, seed
        self._places = {video: place for place, video in enumerate(ring)}
        self._lenders = dict(zip(ring, [*ring[1:], ring[0]], strict=True))

    def read(self, video: str, times_s: np.ndarray) -> np.ndarray:
        """The y* of another video for frames `times_s` [T] of this one, [T, D] float32."""
        lender = self._lenders[video]
        own_s, others_s = self._cache.cached_times_s(video), self._cache.cached_times_s(lender)
        order = np.random.default_rng([self._seed, self._places[video]]).permutation(len(others_s))
        ranks = np.abs(own_s[None] - np.asarray(times_s)[:, None]).argmin(axis=1)
        targets = self._cache.read(lender, others_s[order[ranks % len(order)]], features=False).targets
        assert targets is not None
        return targets
