"""What is read off a training's `metrics.jsonl`: how its distillation went, and its best validation accuracy.

    python -m experiments.claims.curves experiments/claims/results/claims-trainings.json

prints the mean gate of the method's trainings and the lambda with which constant weights of 1 weigh the distillation as
much.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.claims.plan import LAMBDAS, PLANS, REFERENCE
from experiments.claims.trainings import Distillation, Trainings, read_trainings
from stages.errors import UserError
from stages.records import read_json_lines
from stages.train.metric_log import FILE

_WEIGHT, _COSINE, _TARGET_TO_MEAN = "weight/", "cosine/", "target_to_mean"


def rows_of(run: Path, split: str) -> list[dict[str, float]]:
    """The rows of one split, "train" (one a step) or "val".

    Raises:
        UserError: the file is missing or broken, or has no such row.
    """
    rows = [row for _, row in read_json_lines(run / FILE) if row["split"] == split]
    if not rows:
        raise UserError(f"no row of split {split!r}", where=run / FILE)
    return rows


def distillation_of(run: Path) -> Distillation:
    """How the distillation of a training went; each row of its metrics is a batch's mean already.

    Raises:
        UserError: the run has no metrics, or was trained without distillation.
    """
    rows = rows_of(run, "train")
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    return Distillation(
        mean_gate=_over_levels(rows, _WEIGHT, run),
        cosine=_over_levels(last, _COSINE, run),
        target_to_mean=_over_levels(last, _TARGET_TO_MEAN, run),
    )


def _over_levels(rows: Sequence[Mapping[str, float]], prefix: str, run: Path) -> float:
    """Mean over rows, and over the values in each whose names begin so."""
    values = [[value for name, value in row.items() if name.startswith(prefix)] for row in rows]
    if not all(values):
        raise UserError("trained without distillation", where=run)
    return statistics.fmean(map(statistics.fmean, values))


def best_validation(run: Path) -> float:
    """Best accuracy on the validation split, which is that of the checkpoint that was evaluated; UserError if none."""
    return max(row["top1"] for row in rows_of(run, "val"))


def method_gates(trainings: Trainings) -> list[float]:
    """Mean gate of each of the method's own trainings; UserError if not all its seeds are there."""
    own = {one.seed: one.distillation for one in trainings.trainings if one.member == REFERENCE}
    missing = set(PLANS[trainings.plan].seeds) - set(own)
    if missing:
        raise UserError(f"trainings of {REFERENCE!r} are missing: seeds {', '.join(map(str, sorted(missing)))}")
    return [one.mean_gate for one in own.values() if one is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainings", type=Path, help="the file that experiments.claims.collect wrote")
    try:
        gates = method_gates(read_trainings(parser.parse_args().trainings))
    except UserError as error:
        sys.exit(f"error: {error}")
    mean = statistics.fmean(gates)
    print(f"mean gates {', '.join(f'{gate:.4f}' for gate in gates)}")
    print(f"mean {mean:.4f}; lambda {LAMBDAS[REFERENCE]:g} x mean gate = {LAMBDAS[REFERENCE] * mean:.6g}")


if __name__ == "__main__":
    main()
