"""Linear probes in closed form: what can be read off a network's features by a linear map, and nothing cleverer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
_CHOSEN_ON = 0.2  # of the training part
_CONSTANT_STD = 1e-8


def class_accuracy(train: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor, classes: int) -> float:
    """Share of held-out rows whose class a ridge regression onto one-hot labels ranks first.

    Args:
        train: features [N, D].
        labels: their classes [N] int64.
        held_out: features [M, D].
        answers: their classes [M].
    """
    targets = torch.nn.functional.one_hot(labels, classes).double()

    def right(predicted: Tensor, rows: Tensor) -> float:
        return float((predicted.argmax(1) == rows.argmax(1)).double().mean())

    predicted = _predict(train, targets, held_out, right)
    return float((predicted.argmax(1) == answers).double().mean())


def explained(train: Tensor, targets: Tensor, held_out: Tensor, truth: Tensor) -> float:
    """R^2 of a ridge regression on held-out rows, the mean over the targets' columns; 0 for predicting their mean.

    Args:
        train: features [N, D].
        targets: [N, K].
        held_out: features [M, D].
        truth: [M, K].

    Raises:
        ValueError: a target is constant in the held-out rows, or in the training rows that the strength is chosen on.
    """
    return r_squared(_predict(train, targets.double(), held_out, r_squared), truth.double())


def r_squared(predicted: Tensor, truth: Tensor) -> float:
    """1 - residual sum of squares over total sum of squares, the mean over columns; both [M, K].

    Raises:
        ValueError: a column of `truth` is constant, so that there is nothing to explain.
    """
    # Rows are compared, not the sum of squares, which rounding of the mean keeps above 0.
    constant = (truth == truth[:1]).all(0)
    if constant.any():
        raise ValueError(f"a constant target has no R^2: column {int(constant.nonzero()[0])} of {len(truth)} rows")
    residual = ((predicted - truth) ** 2).sum(0)
    total = ((truth - truth.mean(0)) ** 2).sum(0)
    return float((1 - residual / total).mean())


def ridge(train: Tensor, targets: Tensor, others: Tensor, strengths: Sequence[float]) -> list[Tensor]:
    """Predictions [M, K] for rows `others` [M, D] at each strength, of a regression with an intercept.

    Features are standardised by the training rows. Solved in as many unknowns as there are rows or features, whichever
    is less; the two are the same function.
    """
    mean, std = train.double().mean(0), train.double().std(0)
    scale = torch.where(std > _CONSTANT_STD, std, torch.inf)
    rows, queries = (train.double() - mean) / scale, (others.double() - mean) / scale
    centre = targets.mean(0)
    residual = targets - centre
    if rows.shape[0] <= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        known, asked = vectors.T @ residual, (queries @ rows.T) @ vectors
    else:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        known, asked = vectors.T @ (rows.T @ residual), queries @ vectors
    return [asked @ (known / (values.clamp(min=0) + strength)[:, None]) + centre for strength in strengths]


def _predict(train: Tensor, targets: Tensor, held_out: Tensor, score: Callable[[Tensor, Tensor], float]) -> Tensor:
    """Predictions [M, K] with the strength that does best on the last rows of the training part."""
    kept = len(train) - max(1, round(_CHOSEN_ON * len(train)))
    tried = ridge(train[:kept], targets[:kept], train[kept:], _STRENGTHS)
    scores = [score(predicted, targets[kept:]) for predicted in tried]
    best = _STRENGTHS[scores.index(max(scores))]
    return ridge(train, targets, held_out, [best])[0]
