"""The loop that every network of the recipe is trained by: Adam, a warm-up, a cosine, a line now and then."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

Say = Callable[[str], None]

_WARMUP_STEPS = 100
_LAST_LR = 0.02  # of the highest
_SAY_EVERY = 250
_CLIP_NORM = 1.0


@dataclass(frozen=True)
class Trained:
    """A finished training: the mean loss of its last `_SAY_EVERY` steps, its steps, its seconds."""

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
    say: Say,
    after_step: Callable[[], None] | None = None,
) -> Trained:
    """Minimise `loss_of(step)` for so many steps.

    Args:
        name: how the network is called in these lines.
        parameters: what is trained.
        loss_of: draws a batch and returns its loss [].
        steps: how many.
        lr: the highest rate; it rises linearly to it and falls by a cosine to a fiftieth.
        say: called with a line on loss, rate and time left.
        after_step: called after every step.
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
        if (step + 1) % _SAY_EVERY == 0 or step + 1 == steps:
            spent = time.perf_counter() - started
            left = spent / (step + 1) * (steps - step - 1)
            recent = fmean(losses[-_SAY_EVERY:])
            say(f"{name}: step {step + 1} of {steps}, loss {recent:.4f}, {(step + 1) / spent:.1f}/s, {left:.0f} s left")
    return Trained(fmean(losses[-_SAY_EVERY:]), steps, time.perf_counter() - started)


def _share(step: int, steps: int) -> float:
    """The rate of a step as a share of the highest."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (_LAST_LR + (1 - _LAST_LR) * cosine)
