"""From samples and cached features to batches of Stage 2: a sample names its frames by time, the cache finds them.

Features travel in the type in which they are stored, through shared and pinned memory to the device, and are widened
there: int8 is a quarter of the bytes of float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from model.diff_lmm import Clips
from stages.data.manifest import Sample
from stages.device import each_tensor, move
from stages.errors import UserError

if TYPE_CHECKING:
    from stages.batches.control_targets import ShuffledTargets
    from stages.cache.feature_cache import FeatureCache


@dataclass(frozen=True)
class Drawn:
    """A sample as an epoch of training shows it: its frames may be others in every epoch."""

    index: int
    seed: int
    epoch: int


class Window(NamedTuple):
    """One sample's frames.

    `features [T, P, C]` as stored, `targets` y* `[T, D]` float32 or None, `scales [C]` float32 if features are int8.
    """

    sample: Sample
    features: Tensor
    targets: Tensor | None
    scales: Tensor | None


class Windows(NamedTuple):
    """Several windows as torch's own `DataLoader` stacks them: features [B, T, P, C], targets [B, T, D], scales [B, C].

    They are as stored; `widened` makes numbers of them to compute with.
    """

    samples: tuple[Sample, ...]
    features: Tensor
    targets: Tensor | None
    scales: Tensor | None


def stack_windows(windows: Sequence[Window], *, collate_fn_map: object = None) -> Windows:  # noqa: ARG001 - torch gives it
    """Windows -> `Windows`, which a plain `DataLoader` over a `WindowDataset` yields."""
    features, targets, scales = (
        None if part[0] is None else default_collate(list(part))
        for part in zip(*((one.features, one.targets, one.scales) for one in windows), strict=True)
    )
    assert features is not None
    return Windows(tuple(one.sample for one in windows), features, targets, scales)


# So torch.utils.data.default_collate's documentation has one teach it another class.
default_collate_fn_map[Window] = stack_windows


@dataclass(frozen=True)
class Batch:
    """Several windows with their samples.

    Attributes:
        samples: one per clip.
        stored: the clips, their features [B, T, P, C] as stored.
        scales: [B, C] float32 of int8 features, else None.
    """

    samples: tuple[Sample, ...]
    stored: Clips
    scales: Tensor | None

    def on(self, device: torch.device) -> Clips:
        """The clips on a device, widened there."""
        moved = move(self.stored, device)
        features = widened(moved.features, None if self.scales is None else move(self.scales, device))
        return Clips(features, moved.targets, moved.question, moved.answer)

    def rows(self, rows: slice) -> "Batch":
        """Some of the clips, as they are."""
        part = each_tensor(self, lambda tensor: tensor[rows])
        return replace(part, samples=self.samples[rows])

    def not_finite(self) -> list[Sample]:
        """The samples whose features or targets, as the cache gave them, hold NaN or infinity."""
        inputs = (self.stored.features, self.stored.targets, self.scales)
        return [
            sample
            for row, sample in enumerate(self.samples)
            if not all(part is None or bool(part[row].isfinite().all()) for part in inputs)
        ]

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; torch's loader calls this where there is a GPU."""
        return each_tensor(self, Tensor.pin_memory)


def bad_inputs(samples: Sequence[str], videos: Sequence[str], what: str) -> UserError:
    """The error about samples, by id, whose videos' cached features or targets are not finite."""
    named = ", ".join(sorted({repr(video) for video in videos}))
    return UserError(
        f"{what}. Cached features or targets of video {named} hold NaN or infinity",
        where=f"samples {', '.join(samples)}",
        hint="check the cache with `pipeline cache verify CACHE --repair`, then extract these videos again",
    )


def widened(features: Tensor, scales: Tensor | None) -> Tensor:
    """int8 features [B, T, P, C] times their scales [B, C], in bfloat16; others, without scales, are returned as is.

    Clip by clip, because the product is float32 before it is rounded. The numbers are those of `FeatureCache.read`.
    """
    if scales is None:
        return features
    wide = torch.empty(features.shape, dtype=torch.bfloat16, device=features.device)
    for row, (quantised, scale) in enumerate(zip(features, scales, strict=True)):
        wide[row] = quantised * scale
    return wide


class WindowDataset(Dataset[Window]):
    """Samples of one split, each with its frames out of the cache.

    A plain `DataLoader` over it yields `Windows`; with `stages.batches.feed.Collate` as `collate_fn`, tokens too.

    Args:
        tolerance_s: how far a cached time may be from the one asked for.
        control: where y* comes from in place of the frames themselves.

    Raises:
        UserError: the samples do not all have the same number of frames.
    """

    def __init__(
        self,
        cache: "FeatureCache",
        samples: Sequence[Sample],
        *,
        tolerance_s: float,
        with_targets: bool,
        control: "ShuffledTargets | None" = None,
    ) -> None:
        self.cache = cache
        self.samples = tuple(samples)
        self.tolerance_s = tolerance_s
        self.with_targets = with_targets
        self.control = control
        self._check_equal_lengths()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: "int | Drawn") -> Window:
        """The window of a sample: its frames of evaluation for a plain index, those of an epoch for a `Drawn`."""
        if isinstance(place, Drawn):
            sample = self.samples[place.index]
            times_s = sample.training_times_s(place.seed, place.epoch)
        else:
            sample = self.samples[place]
            times_s = sample.frame_times_s()
        own = self.with_targets and self.control is None
        frames = self.cache.read(sample.video, times_s, tolerance_s=self.tolerance_s, targets=own, as_stored=True)
        assert frames.features is not None
        found = frames.targets
        if self.with_targets and self.control is not None:
            found = self.control.read(sample.video, times_s)
        features = torch.from_numpy(frames.features)
        if features.dtype == torch.uint16:
            features = features.view(torch.bfloat16)  # numpy has no such type, so its bits come out of the cache
        targets, scales = (None if array is None else torch.from_numpy(array) for array in (found, frames.scales))
        return Window(sample, features, targets, scales)

    def _check_equal_lengths(self) -> None:
        counts = [len(sample.frame_times_s()) for sample in self.samples]
        if len(set(counts)) > 1:
            odd = next(s for s, count in zip(self.samples, counts, strict=True) if count != counts[0])
            raise UserError(
                f"samples have different numbers of frames {sorted(set(counts))}; first at sample {odd.id!r}",
                hint="give every sample the same num_frames",
            )
