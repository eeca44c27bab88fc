"""Numbers that say how good predictions are."""

import math
from collections import Counter
from collections.abc import Sequence

# Two-sided 95 % quantile of the standard normal distribution.
_Z95 = 1.959963984540054


def majority_floor(answers: Sequence[str]) -> float:
    """Return the accuracy, in 0..1, of always giving the most frequent of `answers`: what a blind model reaches.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("the majority floor of no answers is undefined")
    return max(Counter(answers).values()) / len(answers)


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
