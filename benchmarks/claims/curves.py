"""What is read off a training's `metrics.jsonl`: the mean weight of its gate, and its best validation accuracy.

    python -m benchmarks.claims.curves runs/claims/lambda-0.1-seed*

prints the mean gate of these runs and the lambda with which constant weights of 1 weigh the distillation as much.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.run_folder import RunFolder
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


def kd_weight_of(runs: Sequence[Path]) -> float:
    """The lambda of several runs; UserError if they have different ones."""
    found = {RunFolder.open(run).config().alignment.kd_weight for run in runs}
    if len(found) != 1:
        raise UserError("these runs have different lambdas", received=sorted(found))
    return found.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="runs with adaptive weights, all with one lambda")
    runs = parser.parse_args().runs
    try:
        kd_weight = kd_weight_of(runs)
        gates = [mean_gate(run) for run in runs]
    except UserError as error:
        sys.exit(f"error: {error}")
    for run, gate in zip(runs, gates, strict=True):
        print(f"{run.name:24} mean gate {gate:.4f}")
    mean = statistics.fmean(gates)
    print(f"mean {mean:.4f}; lambda {kd_weight:g} x mean gate = {kd_weight * mean:.6g}")


if __name__ == "__main__":
    main()
