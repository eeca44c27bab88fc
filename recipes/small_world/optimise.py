"""The loop that every network of the recipe is trained by: Adam, a warm-up, a cosine, a line now and then."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

_WARMUP_STEPS = 100
_LAST_LR = 0.02  # of the highest
_PRINT_EVERY = 250
_CLIP_NORM = 1.0


@dataclass(frozen=True)
class Trained:
    """A finished training: the mean loss of its last `_PRINT_EVERY` steps, its steps, its seconds."""

    loss: float
    steps: int
    seconds: float


def optimise(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    after_step: Callable[[], None] | None = None,
) -> Trained:
    """Minimise `loss_of(step)` for so many steps.

    Args:
        loss_of: draws a batch and returns its loss [].
        lr: the highest rate; it rises linearly to it and falls by a cosine to a fiftieth.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    started, losses = time.perf_counter(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * _share(step, steps)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, _CLIP_NORM)
        optimizer.step()
        if after_step is not None:
            after_step()
        losses.append(loss.item())
        if (step + 1) % _PRINT_EVERY == 0 or step + 1 == steps:
            spent = time.perf_counter() - started
            left = spent / (step + 1) * (steps - step - 1)
            recent = fmean(losses[-_PRINT_EVERY:])
            done = f"{name}: step {step + 1} of {steps}, loss {recent:.4f}, {(step + 1) / spent:.1f}/s"
            print(f"{done}, {left:.0f} s left", flush=True)
    return Trained(fmean(losses[-_PRINT_EVERY:]), steps, time.perf_counter() - started)


def _share(step: int, steps: int) -> float:
    """The rate of a step as a share of the highest."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (_LAST_LR + (1 - _LAST_LR) * cosine)
