"""Learning rate as a pure function of the position in training."""

import math

from stages.config import TrainConfig

# The per-step cosine warms up over at most this share of all steps.
_LONGEST_WARMUP = 0.05


def learning_rate(config: TrainConfig, *, epoch: int, step_in_epoch: int, steps_per_epoch: int) -> float:
    """Rate for one optimizer step.

    `ma_lmm` (MA-LMM:lavis/common/optims.py:77-103): in epoch 0 linear from `warmup_start_lr` towards `lr` over
    `warmup_steps`, however few steps the epoch has; from epoch 1 on a cosine over epochs, constant within each.
    `cosine`: linear warm-up, then a cosine over steps.
    """
    if config.schedule == "ma_lmm":
        if epoch == 0:
            return _linear(config, step_in_epoch, config.warmup_steps)
        return _cosine(config, epoch / config.epochs)
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_steps, math.ceil(_LONGEST_WARMUP * total))
    step = epoch * steps_per_epoch + step_in_epoch
    if step < warmup:
        return _linear(config, step, warmup)
    return _cosine(config, (step - warmup) / max(1, total - warmup))


def _linear(config: TrainConfig, step: int, steps: int) -> float:
    progress = step / max(1, steps)
    return min(config.lr, config.warmup_start_lr + (config.lr - config.warmup_start_lr) * progress)


def _cosine(config: TrainConfig, progress: float) -> float:
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
