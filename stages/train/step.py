"""One optimizer step: the losses of a batch and their gradients, part by part, and the check that both are finite."""

import math
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from model.alignment import AlignmentReport
from model.diff_lmm import Clips, DiffLMM, Losses, Share
from model.spans import OPTIMIZER
from stages.batches.windows import Batch, bad_inputs
from stages.config import TrainConfig
from stages.data.manifest import Sample
from stages.device import Compute, autocast, each_tensor, move
from stages.errors import UserError
from stages.train.group import Alone, Group


class Stepper:
    """Takes optimizer steps.

    Args:
        config: the recipe.
        model: on its device.
        compute: device and arithmetic.
        group: the processes that share every batch.
    """

    def __init__(self, config: TrainConfig, model: DiffLMM, compute: Compute, group: Group | None = None) -> None:
        self.config, self.model, self.compute = config, model, compute
        self.group = group or Alone()
        self.parameters = model.trained_parameters()
        self.optimizer = _build_optimizer(config, self.parameters)

    def take(self, step: int, lr: float, parts: Sequence[Batch]) -> Losses:
        """Learn from one batch, which comes in parts.

        Raises:
            UserError: the loss or a gradient is not finite; the samples are named, and no parameter has changed.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._of_all(self._forward_backward(step, parts))
        self._require_finite(losses.total, "loss", step, parts)
        with record_function(OPTIMIZER):
            self.group.sum_gradients(self.parameters.values())
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip or math.inf)
            self._require_finite(norm, "gradient norm", step, parts)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return losses

    def _forward_backward(self, step: int, parts: Sequence[Batch]) -> Losses:
        # Dropout is a function of the step, so that nothing has to be remembered to draw it again.
        drawn = np.random.default_rng([self.config.seed, step, self.group.rank])
        torch.manual_seed(int(drawn.integers(2**63)))
        self._observe(parts)
        frames = _kd_frames(self.config, parts[0].stored.features.shape[1], step)
        losses = []
        for part, share in zip(parts, self._shares(parts), strict=True):
            clips = part.on(self.compute.device)
            with autocast(self.compute.device, self.compute.dtype):
                losses.append(
                    self.model.forward_backward(
                        clips, kd_frames=frames, frames_per_chunk=self.config.frames_per_chunk, share=share
                    )
                )
        return Losses.summed(losses, [len(part.samples) for part in parts])

    def _of_all(self, losses: Losses) -> Losses:
        """The losses of the whole batch from those of each process's equally many clips."""
        total, answer = self.group.sum(losses.total), self.group.sum(losses.answer)
        if losses.kd is None or losses.alignment is None:
            return Losses(total, answer, kd=None, alignment=None)
        own = losses.alignment
        report = AlignmentReport(
            own.levels,
            *(
                self.group.sum(value) / self.group.size
                for value in (own.cosine, own.weight, own.saturated, own.target_to_mean)
            ),
        )
        return Losses(total, answer, self.group.sum(losses.kd), report)

    def _observe(self, parts: Sequence[Batch]) -> None:
        """Tell the running mean of y* of the whole batch before any part of it is computed with."""
        targets = [part.stored.targets for part in parts if part.stored.targets is not None]
        if targets:
            together = torch.cat([move(target, self.compute.device) for target in targets])
            self.model.observe(self.group.gather(together))

    def _shares(self, parts: Sequence[Batch]) -> list[Share]:
        """Eq. 8 is a mean over answer tokens, of the batch or of groups of it, Eq. 7 one over the batch's clips."""
        tokens = [part.stored.answer.answer_mask.sum(1) for part in parts]
        clips = [len(part.samples) for part in parts]
        all_tokens, all_clips = self.group.sum(torch.tensor([int(sum(map(torch.sum, tokens))), sum(clips)])).tolist()
        answers: Sequence[float | Tensor] = [int(part.sum()) / all_tokens for part in tokens]
        if self.config.answer_loss_samples is not None:
            answers = self._token_weights(torch.cat(tokens), self.config.answer_loss_samples).split(clips)
        return [Share(answer=answer, kd=c / all_clips) for answer, c in zip(answers, clips, strict=True)]

    def _token_weights(self, tokens: Tensor, size: int) -> Tensor:
        """What each token of this process's samples [S] weighs where Eq. 8 is a mean over groups of so many samples.

        Groups follow the batch's order, in which the processes' samples stand one after the other.
        """
        place = self.group.rank * len(tokens) + torch.arange(len(tokens))
        group_of, num_groups = place // size, -(-len(tokens) * self.group.size // size)
        in_group = self.group.sum(torch.zeros(num_groups, dtype=tokens.dtype).index_add(0, group_of, tokens))
        return (1 / (num_groups * in_group[group_of].double())).float().to(self.compute.device)

    def _require_finite(self, value: Tensor, what: str, step: int, parts: Sequence[Batch]) -> None:
        if not math.isfinite(value.item()):
            self._refuse(f"{what} is {value.item()} at step {step}; nothing was overwritten", parts)

    def _refuse(self, what: str, parts: Sequence[Batch]) -> NoReturn:
        planted = [sample for part in parts for sample in part.not_finite()]
        ids = self.group.texts([sample.id for sample in planted])
        if ids:
            raise bad_inputs(ids, self.group.texts([sample.video for sample in planted]), what)
        alone = [sample for part in parts for sample in self._with_bad_losses(part)]
        raise UserError(
            what,
            where=f"samples {self._named(alone) or self._named([one for part in parts for one in part.samples])}",
            hint="their features are finite: lower train.lr, or clip gradients with train.grad_clip=1",
        )

    def _named(self, samples: Sequence[Sample]) -> str:
        """The ids of these samples of all processes."""
        return ", ".join(self.group.texts([sample.id for sample in samples]))

    @torch.no_grad()
    def _with_bad_losses(self, batch: Batch) -> list[Sample]:
        """The samples whose own answer loss is not finite."""
        self.model.eval()
        clips, found = batch.on(self.compute.device), []
        for row, sample in enumerate(batch.samples):
            one = _clip(clips, row)
            with autocast(self.compute.device, self.compute.dtype):
                queries, _ = self.model.watch(one.features, one.question)
                loss = self.model.language.answer_loss(queries, one.answer)
            if not math.isfinite(loss.item()):
                found.append(sample)
        return found


def _build_optimizer(config: TrainConfig, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW whose decay spares vectors: biases and norms (MA-LMM:lavis/runners/runner_base.py:104-120)."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))


def _kd_frames(config: TrainConfig, frames: int, step: int) -> Sequence[int] | None:
    if config.kd_frames == "all":
        return None
    if config.kd_frames == "last":
        return [frames - 1]
    random = np.random.default_rng([config.seed, step, frames])
    drawn: list[int] = random.choice(frames, size=min(config.kd_frames, frames), replace=False).tolist()
    return drawn


def _clip(clips: Clips, row: int) -> Clips:
    """One clip of several."""

    def of_row(tensor: Tensor) -> Tensor:
        return tensor[row : row + 1]

    return each_tensor(clips, of_row)
