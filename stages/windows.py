"""From samples and cached features to batches of Stage 2: a sample names its frames by time, the cache finds them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.diff_lmm import Clips
from stages.errors import UserError
from stages.manifest import Sample
from stages.tokens import Tokenizers

if TYPE_CHECKING:
    from stages.cache.feature_cache import FeatureCache


class Window(NamedTuple):
    """One sample's frames: features [T, P, C] in the cache's type, targets y* [T, D] float32 or None."""

    sample: Sample
    features: Tensor
    targets: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Several windows with their samples; the tensors are those of `Clips`."""

    samples: tuple[Sample, ...]
    clips: Clips


class WindowDataset(Dataset[Window]):
    """Samples of one split, each with its frames out of the cache.

    Args:
        cache: where the features are.
        samples: what to serve, in this order.
        tolerance_s: how far a cached time may lie from the one asked for.
        with_targets: whether y* is read too.

    Raises:
        UserError: the samples do not all have the same number of frames.
    """

    def __init__(
        self, cache: "FeatureCache", samples: Sequence[Sample], *, tolerance_s: float, with_targets: bool
    ) -> None:
        self.cache = cache
        self.samples = tuple(samples)
        self.times = [sample.frame_times_s() for sample in self.samples]
        self.tolerance_s = tolerance_s
        self.with_targets = with_targets
        self._check_equal_lengths()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Window:
        sample = self.samples[index]
        frames = self.cache.read(
            sample.video, self.times[index], tolerance_s=self.tolerance_s, targets=self.with_targets
        )
        assert frames.features is not None
        features = torch.from_numpy(frames.features)
        if features.dtype == torch.uint16:
            features = features.view(torch.bfloat16)  # numpy has no such type, so its bits come out of the cache
        targets = None if frames.targets is None else torch.from_numpy(frames.targets)
        return Window(sample, features, targets)

    def _check_equal_lengths(self) -> None:
        lengths = {len(times) for times in self.times}
        if len(lengths) > 1:
            odd = next(s for s, times in zip(self.samples, self.times, strict=True) if len(times) != len(self.times[0]))
            raise UserError(
                f"samples have different numbers of frames {sorted(lengths)}; first at sample {odd.id!r}",
                hint="give every sample the same num_frames",
            )


class EpochOrder:
    """The order of one epoch: a permutation that depends on seed and epoch alone, so that it can be drawn again."""

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length = length
        # An incomplete batch is dropped, as in MA-LMM (FACTS.md C.7), unless it is the only one.
        self.batch_size = min(batch_size, length)
        self.seed = seed

    @property
    def num_batches(self) -> int:
        """Optimizer steps per epoch."""
        return self.length // self.batch_size

    def batches(self, epoch: int) -> list[list[int]]:
        """Sample indices of each batch of an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        return [
            order[start : start + self.batch_size].tolist()
            for start in range(0, self.num_batches * self.batch_size, self.batch_size)
        ]


class Collate:
    """Windows -> `Batch`: stack, tokenize. A class, so that worker processes can be given it."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        self.tokenizers = tokenizers

    def __call__(self, windows: Sequence[Window]) -> Batch:
        """Stack windows of equal length into one batch."""
        prompts = [window.sample.prompt_text for window in windows]
        answers = [window.sample.answer for window in windows]
        targets = [window.targets for window in windows if window.targets is not None]
        clips = Clips(
            features=torch.stack([window.features for window in windows]),
            targets=torch.stack(targets) if targets else None,
            question=self.tokenizers.question(prompts),
            answer=self.tokenizers.training(prompts, answers),
        )
        return Batch(tuple(window.sample for window in windows), clips)


def feed(
    dataset: WindowDataset, batches: Sequence[Sequence[int]], tokenizers: Tokenizers, *, workers: int
) -> Iterator[Batch]:
    """Read the named batches in order, ahead of time in `workers` processes (0: in this one)."""
    loader = DataLoader(
        dataset,
        batch_sampler=[list(batch) for batch in batches],
        collate_fn=Collate(tokenizers),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Forked workers may hang on locks that other threads held; cache readers open their files themselves.
        multiprocessing_context="spawn" if workers else None,
    )
    return iter(loader)
