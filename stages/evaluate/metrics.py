"""Numbers that say how good predictions are and how sure that is; sources are in docs/evaluation.md."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

# Two-sided 95 % quantile of the standard normal distribution.
_Z95 = 1.959963984540054
_QUANTILES95 = (0.025, 0.975)
# Draws held at once while resampling (8 bytes each); more take more memory, not other numbers.
_MOST_DRAWS = 2**22


def majority_answer(answers: Sequence[str]) -> str:
    """Return the most frequent of `answers`, of equally frequent ones the first to occur.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("the majority of no answers is undefined")
    return Counter(answers).most_common(1)[0][0]


def majority_floor(answers: Sequence[str]) -> float:
    """Return the accuracy, in 0..1, of always giving the most frequent of `answers`: what a blind model reaches.

    Raises:
        ValueError: there are no answers.
    """
    return constant_accuracy(answers, majority_answer(answers))


def constant_accuracy(answers: Sequence[str], given: str) -> float:
    """Return the accuracy, in 0..1, of always answering `given` where `answers` are right.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("the accuracy on no answers is undefined")
    return sum(answer == given for answer in answers) / len(answers)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, both ends in [0, 1].

    Raises:
        ValueError: `total` is not positive, or `correct` is not within 0..total.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total} is no proportion")
    share, z2 = correct / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # At 0 and at `total` the formula's own ends are 0 and 1 up to rounding.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return low, high


def bootstrap_interval(
    sums: Sequence[int], sizes: Sequence[int], *, resamples: int, seed: int
) -> tuple[float, float] | None:
    """95 % percentile interval of sum(sums) / sum(sizes) over resampled groups, as whole groups are drawn.

    As many groups as there are, drawn with replacement, `resamples` times. None for fewer than two groups: a single
    one says nothing of how groups differ.

    Args:
        sums: of each group [V], for example its right answers.
        sizes: of each group [V], its samples.
        resamples: how often to draw.
        seed: the same seed gives the same interval.
    """
    groups = len(sizes)
    if groups < 2:
        return None
    pairs = np.stack([np.asarray(sums), np.asarray(sizes)], axis=1).astype(np.float64)
    random = np.random.default_rng(seed)
    shares = np.empty(resamples)
    rows = max(1, _MOST_DRAWS // groups)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = random.multinomial(groups, np.full(groups, 1 / groups), size=count) @ pairs
        shares[start : start + count] = drawn[:, 0] / drawn[:, 1]
    low, high = np.quantile(shares, _QUANTILES95).tolist()
    return low, high


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: how likely, were both equally good, a split at least as uneven as this one is.

    Twice the lower tail of a binomial of the differing answers with one half each, at most 1.

    Raises:
        ValueError: a count is negative.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"{only_first} and {only_second} are no counts")
    differing, fewer = only_first + only_second, min(only_first, only_second)
    term = tail = 1
    for index in range(fewer):
        term = term * (differing - index) // (index + 1)
        tail += term
    # Whole numbers, so that nothing is lost before the one division.
    return min(1.0, 2 * tail / 2**differing)
