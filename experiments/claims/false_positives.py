"""How often the study's bootstrap finds an effect where there is none, by how much trainings differ (PLAN.md).

python -m experiments.claims.false_positives
python -m experiments.claims.false_positives --seeds 8 --videos 432 --dissent 1      # the second run
"""

import argparse
import sys

import numpy as np

from experiments.claims.effects import Gains, draw, effect_of, resampled
from stages.errors import UserError

TASK = "scene"
# Standard deviations in points: of a training's gain, of a training's gain on one video, of a video's gain.
SPREADS = ((3.0, 0.0, 0.0), (3.0, 15.0, 0.0), (1.5, 15.0, 0.0), (0.5, 15.0, 5.0))


def shares_below(
    spread: tuple[float, float, float], *, seeds: int, videos: int, dissent: int, repeats: int
) -> dict[str, float]:
    """Shares of repeats with p below 0.05, and with that and all seeds but `dissent` of them on one side of 0."""
    random = np.random.default_rng(0)
    of_seed, of_both, of_video = (points / 100 for points in spread)
    names = tuple(f"{index:03d}" for index in range(videos))
    found = {"p < 0.05": 0, "and the seeds agree": 0}
    for number in range(repeats):
        sums = random.normal(0, of_seed, (seeds, 1)) + random.normal(0, of_both, (seeds, videos))
        sums += random.normal(0, of_video, videos)
        gains = Gains(tuple(range(seeds)), names, {TASK: sums}, {TASK: np.ones(videos)})
        effect = effect_of(resampled(gains, draw(seeds, videos, resamples=1000, seed=number))[TASK])
        means = sums.mean(axis=1)
        found["p < 0.05"] += effect.p < 0.05
        found["and the seeds agree"] += effect.p < 0.05 and max((means > 0).sum(), (means < 0).sum()) >= seeds - dissent
    return {what: count / repeats for what, count in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--videos", type=int, default=144)
    parser.add_argument("--dissent", type=int, default=0, help="seeds that may point the other way")
    parser.add_argument("--repeats", type=int, default=600)
    options = parser.parse_args()
    for spread in SPREADS:
        try:
            shares = shares_below(spread, **vars(options))
        except UserError as error:
            sys.exit(f"error: {error}")
        print(spread, ", ".join(f"{what}: {share:.1%}" for what, share in shares.items()))


if __name__ == "__main__":
    main()
