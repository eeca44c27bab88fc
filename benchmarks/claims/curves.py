"""What is read off a training's `metrics.jsonl`: the mean weight of its gate, and its best validation accuracy.

    python -m benchmarks.claims.curves benchmarks/results/claims-trainings.json

prints the mean gate of the method's trainings and the lambda with which constant weights of 1 weigh the distillation as
much.
"""

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.claims.plan import LAMBDAS, REFERENCE
from benchmarks.claims.trainings import Trainings, read_trainings
from stages.errors import UserError
from stages.metric_log import FILE
from stages.records import read_json_lines

_WEIGHT = "weight/"


def rows_of(run: Path, split: str) -> list[dict[str, float]]:
    """The rows of one split, "train" (one a step) or "val".

    Raises:
        UserError: the file is missing or broken, or has no such row.
    """
    rows = [row for _, row in read_json_lines(run / FILE) if row["split"] == split]
    if not rows:
        raise UserError(f"no row of split {split!r}", where=run / FILE)
    return rows


def mean_gate(run: Path) -> float:
    """Mean of w_i of Eq. 6 over all steps of a training and its aligned levels; each row is a batch's mean already.

    Raises:
        UserError: the run has no metrics, or was trained without distillation.
    """
    means = []
    for row in rows_of(run, "train"):
        weights = [value for name, value in row.items() if name.startswith(_WEIGHT)]
        if not weights:
            raise UserError("trained without distillation, so that it has no gate", where=run)
        means.append(statistics.fmean(weights))
    return statistics.fmean(means)


def best_validation(run: Path) -> float:
    """Best accuracy on the validation split, which is that of the checkpoint that was evaluated; UserError if none."""
    return max(row["top1"] for row in rows_of(run, "val"))


def method_gates(trainings: Trainings) -> list[float]:
    """Mean gate of each of the method's own trainings; UserError if not all its seeds are there."""
    gates = {one.seed: one.mean_gate for one in trainings.trainings if one.member == REFERENCE}
    missing = {one.seed for one in trainings.trainings} - set(gates)
    if missing or not gates:
        raise UserError(f"trainings of {REFERENCE!r} are missing: seeds {', '.join(map(str, sorted(missing)))}")
    return [gate for gate in gates.values() if gate is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainings", type=Path, help="the file that benchmarks.claims.collect wrote")
    try:
        gates = method_gates(read_trainings(parser.parse_args().trainings))
    except UserError as error:
        sys.exit(f"error: {error}")
    mean = statistics.fmean(gates)
    print(f"mean gates {', '.join(f'{gate:.4f}' for gate in gates)}")
    print(f"mean {mean:.4f}; lambda {LAMBDAS[REFERENCE]:g} x mean gate = {LAMBDAS[REFERENCE] * mean:.6g}")


if __name__ == "__main__":
    main()
