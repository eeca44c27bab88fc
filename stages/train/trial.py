"""One training step to measure: on cached clips, or on random ones of the true shapes where there is no cache."""

import time
from collections.abc import Sequence

import torch

from model.diff_lmm import Clips
from stages.batches.windows import Batch
from stages.data.manifest import Sample
from stages.errors import UserError
from stages.frozen.shapes import FrameShape
from stages.networks.tokens import Tokenizers
from stages.train.step import Stepper


def random_batch(tokenizers: Tokenizers, samples: Sequence[Sample], shape: FrameShape, *, distils: bool) -> Batch:
    """Clips as the cache would give them of these samples, with random features [B, T, P, C] float16 and y* [B, T, D].

    Args:
        tokenizers: of the model.
        samples: one for each clip; they all have the same number of frames.
        shape: of a frame.
        distils: whether there are targets.
    """
    generator = torch.Generator().manual_seed(0)
    clips, frames = len(samples), len(samples[0].frame_times_s())
    features = torch.randn(clips, frames, shape.tokens, shape.width, generator=generator, dtype=torch.float16)
    targets = torch.randn(clips, frames, shape.teacher_width, generator=generator) if distils else None
    prompts = [tokenizers.fitted(sample.question, sample.prompt) for sample in samples]
    answers = tokenizers.training(prompts, [sample.answer for sample in samples])
    return Batch(tuple(samples), Clips(features, targets, tokenizers.question(prompts), answers), scales=None)


def timed_step(stepper: Stepper, parts: Sequence[Batch], *, step: int = 0) -> float:
    """Take a step as training does, losses, backward pass and optimizer; the seconds that it took.

    Raises:
        UserError: its loss or gradient is not finite.
    """
    started = time.perf_counter()
    stepper.take(step, stepper.config.lr, parts)
    bad = stepper.bad_step()  # reads the device, which has ended by then
    if bad is not None:
        raise UserError(f"{bad[1]} in the step that was to be measured")
    return time.perf_counter() - started
