"""One optimizer step: the losses of a batch and their gradients, part by part, and the check that both are finite.

A step that does not fit into the memory is taken again in smaller parts. Its losses are the same but for rounding:
dropout is a function of seed, step and place in the batch, and what the processes share is summed once, before.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from model.alignment import AlignmentReport
from model.diff_lmm import Clips, DiffLMM, Losses, LossWeights
from model.qformer.qformer import frames_per_chunk_of
from model.spans import OPTIMIZER
from stages.batches.windows import Batch, bad_inputs
from stages.config import TrainConfig
from stages.data.manifest import Sample
from stages.device import Compute, autocast, each_tensor, move, unless_out_of_memory
from stages.errors import LackOfMemoryError, UserError
from stages.networks.memory_law import Parts
from stages.train.group import Group, SingleProcess
from stages.wording import counted

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """Some clips of a step: what their losses weigh, and the seed of each one's dropout [B] int64."""

    batch: Batch
    share: LossWeights
    seeds: Tensor

    def cut(self, clips: int) -> "Iterator[_Piece]":
        """The same in pieces of at most so many clips."""
        whole, answer = len(self.batch.samples), self.share.answer
        assert isinstance(answer, Tensor)
        for start in range(0, whole, clips):
            rows = slice(start, start + clips)
            part, answer = self.batch.rows(rows), self.share.answer
            kd = self.share.kd * len(part.samples) / whole
            yield _Piece(
                part, LossWeights(answer[rows] if isinstance(answer, Tensor) else answer, kd), self.seeds[rows]
            )


class Stepper:
    """Takes optimizer steps.

    Args:
        config: the recipe.
        model: on its device.
        compute: device and arithmetic.
        group: the processes that share every batch.

    Attributes:
        parts: how steps are cut; less than whole batches once one did not fit.
        on_smaller: called when that happens.
    """

    def __init__(self, config: TrainConfig, model: DiffLMM, compute: Compute, group: Group | None = None) -> None:
        self.config, self.model, self.compute = config, model, compute
        self.parts = Parts(
            config.batch_size, config.frames_per_chunk or frames_per_chunk_of(model.qformer.config.memory_slots)
        )
        self.on_smaller: Callable[[], None] = lambda: None
        self.group = group or SingleProcess()
        self.parameters = model.trained_parameters()
        self.optimizer = _build_optimizer(config, self.parameters)
        # Step, loss and gradient norm of the first step that was not finite. It stays on the device, since reading it
        # would have the CPU wait for every step.
        self._first_bad = torch.full((3,), -1.0, device=compute.device)

    def take(self, step: int, lr: float, parts: Sequence[Batch]) -> Losses:
        """Learn from one batch, which comes in parts; nothing is read back from the device, see `bad_step`."""
        self.model.train()
        own = self._forward_backward(step, parts)
        with record_function(OPTIMIZER):
            losses = _unpacked(self.group.sum_gradients(self.parameters.values(), _packed(own)), own, self.group.size)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip or math.inf)
            self._note(step, losses.total, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return losses

    def _note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        now = torch.stack([torch.full_like(loss, step), loss, norm.to(loss.dtype)])
        is_first = (self._first_bad[0] < 0) & ~now.isfinite().all()
        self._first_bad = torch.where(is_first, now, self._first_bad)

    def bad_step(self) -> tuple[int, str] | None:
        """The first step whose loss or gradient was not finite, and what was; None if all were. Reads the device."""
        step, loss, norm = self._first_bad.tolist()
        if step < 0:
            return None
        return int(step), f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"

    def _forward_backward(self, step: int, parts: Sequence[Batch]) -> Losses:
        # Dropout is a function of the step and of the place in the batch: nothing is remembered to draw it again.
        own = sum(len(part.samples) for part in parts)
        drawn = np.random.default_rng([self.config.seed, step]).integers(2**62, size=own * self.group.size)
        seeds = torch.from_numpy(drawn[self.group.rank * own :][:own]).split([len(part.samples) for part in parts])
        frames = _kd_frames(self.config, parts[0].stored.features.shape[1], step)
        pieces = [_Piece(*piece) for piece in zip(parts, self._shares(parts), seeds, strict=True)]
        while (losses := self._attempt(pieces, frames)) is None:
            self._take_smaller_parts()
        return losses

    def _attempt(self, pieces: Sequence[_Piece], frames: Sequence[int] | None, beside: int = 0) -> Losses | None:
        """Losses, and gradients of them alone; None where the memory did not hold them, and then it is free again.

        Args:
            pieces: the clips, which are cut into `parts`.
            frames: those that are distilled.
            beside: so many float32 numbers have to fit beside them.
        """
        self.optimizer.zero_grad(set_to_none=True)
        device = self.compute.device

        def losses() -> Losses:
            held, found, clips = torch.empty(beside, device=device), [], []
            for piece in chain.from_iterable(one.cut(self.parts.clips) for one in pieces):
                with autocast(device, self.compute.dtype):
                    part = self.model.forward_backward(
                        piece.batch.on(device),
                        kd_frames=frames,
                        frames_per_chunk=self.parts.frames,
                        share=move(piece.share, device),
                        seeds=move(piece.seeds, device),
                    )
                found.append(part)
                clips.append(len(piece.batch.samples))
            del held
            return Losses.summed(found, clips)

        return unless_out_of_memory(losses)

    def _take_smaller_parts(self) -> None:
        """Halve what goes through the networks at once; UserError if it is one frame of one clip.

        Each process does so for itself, since none waits for another within a forward or backward pass; but for a
        language model in pieces, for which all wait at every layer.
        """
        self.optimizer.zero_grad(set_to_none=True)
        smaller = self.parts.halved()
        if smaller is None:
            raise LackOfMemoryError(
                "the memory does not hold a training step of one sample with one frame at a time",
                where=str(self.compute.device),
                hint="set language.quantize=nf4 or train.precision=bfloat16, or num_frames of the card to less",
                exit_code=1,
            )
        if self.config.shard_language != "none":
            raise UserError(
                f"the memory does not hold {counted(self.parts.clips, 'sample')} at once, and with the language model "
                "in pieces on all processes none can take a step again by itself",
                where=str(self.compute.device),
                hint=f"go on by the same command with --resume --set train.micro_batch_size={smaller.clips} "
                f"--set train.frames_per_chunk={smaller.frames}",
                exit_code=1,
            )
        self.parts = smaller
        _LOG.warning("too little memory for a step: going on with %s, the losses are the same", smaller)
        self.on_smaller()

    def try_parts(self, part: Batch) -> None:
        """Go forward and backward once, in smaller parts until one fits, and throw the gradients away.

        Nothing that a step depends on is changed; what the optimizer will remember has to fit beside it.

        Args:
            part: of as many clips as `parts` has, or fewer.
        """
        self.model.train()
        alignment, samples = self.model.alignment, len(part.samples)
        buffers = {} if alignment is None else dict(alignment.named_buffers())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        if alignment is not None and part.stored.targets is not None:
            alignment.observe(move(part.stored.targets, self.compute.device))
        frames = _kd_frames(self.config, part.stored.features.shape[1], 0)
        whole = _Piece(part, LossWeights(torch.ones(samples), 1.0), torch.zeros(samples, dtype=torch.int64))
        moments = 2 * sum(p.numel() for p in self.parameters.values() if p not in self.optimizer.state)
        # The first piece alone: others need no more.
        while self._attempt([next(whole.cut(self.parts.clips))], frames, moments) is None:
            self._take_smaller_parts()
        self.optimizer.zero_grad(set_to_none=True)
        for name, buffer in buffers.items():
            buffer.copy_(before[name])

    def _shares(self, parts: Sequence[Batch]) -> list[LossWeights]:
        """Eq. 8 is a mean over answer tokens, of the batch or of groups of it, Eq. 7 one over the batch's clips.

        What the processes need of one another before the forward is summed at once: the tokens of every group, and,
        for the running mean of y*, the mean of each process's targets.
        """
        per_part = [part.stored.answer.answer_mask.sum(1) for part in parts]
        tokens, clips = torch.cat(per_part), [len(part.samples) for part in parts]
        together = len(tokens) * self.group.size
        # Groups follow the batch's order, in which the processes' samples stand one after the other.
        size = self.config.answer_loss_samples or together
        group_of = (self.group.rank * len(tokens) + torch.arange(len(tokens))) // size
        num_groups = -(-together // size)
        in_group = torch.zeros(num_groups, dtype=torch.float64).index_add(0, group_of, tokens.double())
        targets = [part.stored.targets for part in parts if part.stored.targets is not None]
        mean = torch.cat([target.double() for target in targets]).mean(dim=(0, 1)) if targets else torch.empty(0)
        summed = self.group.sum(torch.cat([in_group, mean.double()]))
        in_group, mean = summed[:num_groups], summed[num_groups:]
        if targets and self.model.alignment is not None:
            seen = together * targets[0].shape[1]
            self.model.alignment.observe_mean(move((mean / self.group.size).float(), self.compute.device), seen)
        answers = (1 / (num_groups * in_group[group_of])).float().split(clips)
        return [LossWeights(answer=answer, kd=c / together) for answer, c in zip(answers, clips, strict=True)]

    def refuse(self, what: str, parts: Sequence[Batch]) -> NoReturn:
        """UserError that names the samples of a batch whose loss or gradient is not finite."""
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


def _packed(losses: Losses) -> Tensor:
    """The numbers of a batch's losses, [K] float32."""
    values = [losses.total, losses.answer]
    if losses.kd is not None and losses.alignment is not None:
        report = losses.alignment
        values += [losses.kd, report.saturated, report.target_to_mean, report.cosine, report.weight]
    return torch.cat([value.detach().float().flatten() for value in values])


def _unpacked(summed: Tensor, own: Losses, processes: int) -> Losses:
    """The losses of the whole batch from the sum of `_packed`, of which each process has equally many clips."""
    if own.kd is None or own.alignment is None:
        return Losses(summed[0], summed[1], kd=None, alignment=None)
    levels = len(own.alignment.levels)
    saturated, to_mean, cosine, weight = (summed[3:] / processes).split([1, 1, levels, levels])
    report = AlignmentReport(own.alignment.levels, cosine, weight, saturated[0], to_mean[0])
    return Losses(summed[0], summed[1], summed[2], report)


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
