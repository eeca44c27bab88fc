"""How much better one model is than another, by task and by group of tasks, with intervals over videos and seeds.

Pure functions of answers. A difference is a share of right answers, the second model's less the first one's, of
answers to the same samples by trainings with the same seed. A group's is the mean of its tasks', each with the same
weight however many samples it has.

The bootstrap draws videos and, independently of them, seeds, both with replacement: a conclusion is meant for other
videos and for other trainings. A drawn video counts with all its windows. Every comparison of a study uses the same
draws, so that a difference of two differences is paired as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.errors import UserError
from stages.evaluate.comparison import Answered, Pair, pair

BySeed = Mapping[int, Sequence[Answered]]

GROUPS = {
    "fine": ("director", "writer", "way_speaking"),
    "coarse": ("scene", "genre", "year"),
    "over time": ("relationship",),
}
"""Tasks of the synthetic set by what they need: a few pixels, any frame as a whole, or several frames."""
ALL = "all"
"""Name of what pools all tasks."""
FINE_LESS_COARSE = "fine - coarse"
"""Name of the difference of the two groups' differences."""
_QUANTILES95 = (0.025, 0.975)


@dataclass(frozen=True)
class Gains:
    """What the second model gains over the first, before anything is averaged.

    Attributes:
        seeds: of the trainings [S], ascending.
        videos: ids [V], in order.
        sums: by task [S, V] float64: right answers of the second less those of the first, over a video's windows.
        counts: by task [V] float64: windows of each video.
    """

    seeds: tuple[int, ...]
    videos: tuple[str, ...]
    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Draws:
    """How often each seed [R, S] and each video [R, V] is drawn in R resamples, float64."""

    seeds: np.ndarray
    videos: np.ndarray


@dataclass(frozen=True)
class Resampled:
    """A statistic of all the data, and of every resample [R]."""

    value: float
    values: np.ndarray


@dataclass(frozen=True)
class Effect:
    """A statistic as a share, its 95 % percentile interval, and its two-sided bootstrap p against 0."""

    difference: float
    ci95: tuple[float, float]
    p: float


def gains_of(base: BySeed, other: BySeed) -> Gains:
    """Pair two models' answers, seed by seed and sample by sample.

    Args:
        base: the first model's answers by seed.
        other: the second one's.

    Raises:
        UserError: they have other seeds, another sample, or another question under one sample's id; or a task lacks
            some of the videos.
    """
    _require_seeds(base, other)
    seeds = tuple(sorted(base))
    videos = tuple(sorted({row.video for row in base[seeds[0]]}))
    tasks = sorted({row.task for row in base[seeds[0]]})
    place = {video: index for index, video in enumerate(videos)}
    sums = {task: np.zeros((len(seeds), len(videos))) for task in tasks}
    counts = {task: np.zeros(len(videos)) for task in tasks}
    for row in base[seeds[0]]:
        counts[row.task][place[row.video]] += 1
    for number, seed in enumerate(seeds):
        _require_paired(base[seed], base[seeds[0]], f"seeds {seed} and {seeds[0]} of the first")
        for first, second in _require_paired(base[seed], other[seed], f"seed {seed}"):
            sums[first.task][number, place[first.video]] += int(second.correct) - int(first.correct)
    for task, of_task in counts.items():
        if not of_task.all():
            raise UserError(f"task {task!r} has no sample of {int((of_task == 0).sum())} of {len(videos)} videos")
    return Gains(seeds, videos, sums, counts)


def _require_seeds(base: BySeed, other: BySeed) -> None:
    if set(base) != set(other) or not base:
        raise UserError(
            "two members were trained with different seeds",
            received=sorted(other),
            allowed=str(sorted(base)),
            hint="let the study come to its end",
        )


def _require_paired(first: Sequence[Answered], second: Sequence[Answered], what: str) -> tuple[Pair, ...]:
    pairing = pair(first, second)
    if pairing.only_first or pairing.only_second:
        raise UserError(
            f"{what}: different samples were answered, {pairing.only_first} only by the first, "
            f"{pairing.only_second} only by the second"
        )
    return pairing.pairs


def draw(num_seeds: int, num_videos: int, *, resamples: int, seed: int) -> Draws:
    """Draw as many seeds and videos as there are, with replacement and independently of one another.

    Raises:
        UserError: there are fewer than two seeds or videos, which say nothing of how others would differ, or no
            resamples are asked for; or the seed is negative.
    """
    for what, number, least in (("seeds", num_seeds, 2), ("videos", num_videos, 2), ("resamples", resamples, 1)):
        if number < least:
            raise UserError(f"too few {what} for an interval", received=number, allowed=f"{least} or more")
    if seed < 0:
        raise UserError("the seed of the bootstrap is negative", received=seed, allowed="0 or more")
    random = np.random.default_rng(seed)
    return Draws(_counts(random, num_seeds, resamples), _counts(random, num_videos, resamples))


def _counts(random: np.random.Generator, number: int, resamples: int) -> np.ndarray:
    return random.multinomial(number, np.full(number, 1 / number), size=resamples).astype(np.float64)


def one_of_each_seed(gains: Gains) -> Draws:
    """No resamples: each seed alone [S, S], with all videos."""
    return Draws(np.eye(len(gains.seeds)), np.ones((len(gains.seeds), len(gains.videos))))


def resampled(gains: Gains, draws: Draws) -> dict[str, Resampled]:
    """The differences of every task, group, all tasks, and of fine less coarse, with their resamples.

    Groups of which a task is missing are left out.
    """
    found = {task: _of_task(gains.sums[task], gains.counts[task], draws) for task in gains.sums}
    tasks = tuple(found)
    groups: dict[str, tuple[str, ...]] = {**GROUPS, ALL: tasks}
    for group, members in groups.items():
        if set(members) <= set(tasks):
            found[group] = _mean([found[task] for task in members])
    if {"fine", "coarse"} <= set(found):
        found[FINE_LESS_COARSE] = less(found["fine"], found["coarse"])
    return found


def _of_task(sums: np.ndarray, counts: np.ndarray, draws: Draws) -> Resampled:
    """Mean gain of a window, `sums` [S, V] over `counts` [V]."""
    value = float(sums.sum() / (len(sums) * counts.sum()))
    gained = ((draws.seeds @ sums) * draws.videos).sum(axis=1)
    return Resampled(value, gained / (draws.seeds.sum(axis=1) * (draws.videos @ counts)))


def _mean(parts: Sequence[Resampled]) -> Resampled:
    value = sum(part.value for part in parts) / len(parts)
    return Resampled(value, np.mean([part.values for part in parts], axis=0))


def less(first: Resampled, second: Resampled) -> Resampled:
    """`first` less `second`, resample by resample; both of the same draws."""
    return Resampled(first.value - second.value, first.values - second.values)


def without_rounding(values: np.ndarray) -> np.ndarray:
    """Shares [...] with 0 for what is 0 by right: groups are means of shares, and may be off by a rounding."""
    return np.where(np.abs(values) < np.finfo(np.float64).eps * 8, 0.0, values)


def effect_of(one: Resampled) -> Effect:
    """Interval and p of a statistic.

    p is twice the smaller share of resamples on either side of 0, those at 0 on both sides, with the statistic itself
    taken as one more resample; so it is never 0, and 1 at most.
    """
    low, high = np.quantile(one.values, _QUANTILES95).tolist()
    values = without_rounding(one.values)
    fewer = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return Effect(one.value, (low, high), min(1.0, 2 * (fewer + 1) / (len(values) + 1)))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of a family of tests: each one's adjusted p, at most 1."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda one: p[one])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}
