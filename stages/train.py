"""Stage 2's training loop: what is read, stepped, validated, saved and resumed, in this order.

One seed gives one sequence of losses: the order of samples is a function of (seed, epoch), dropout of (seed, step).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import LanguageConfig
from model.diff_lmm import DiffLMM, Losses
from stages.checkpoint import Checkpoints, Position, optimizer_tensors, restore_optimizer
from stages.config import TrainConfig
from stages.device import autocast, move
from stages.errors import UserError
from stages.evaluate import mean_answer_loss, predict_batches
from stages.metric_log import MetricLog
from stages.schedule import learning_rate
from stages.tokens import Tokenizers
from stages.windows import Batch, EpochOrder, WindowDataset, feed

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Compute:
    """Where the networks run and in which arithmetic."""

    device: torch.device
    dtype: torch.dtype


class Trainer:
    """One training run.

    Args:
        config: the recipe.
        language: how validation answers are generated.
        model: as it starts; it stays on its device.
        tokenizers: of the model.
        train_set: samples to learn from.
        val_set: samples to choose the best epoch by; None to choose the last.
        run: folder for checkpoints and metrics.
        compute: device and arithmetic.
        eval_batch_size: samples per beam search in validation.
    """

    def __init__(
        self,
        config: TrainConfig,
        language: LanguageConfig,
        model: DiffLMM,
        tokenizers: Tokenizers,
        train_set: WindowDataset,
        val_set: WindowDataset | None,
        *,
        run: Path,
        compute: Compute,
        eval_batch_size: int,
    ) -> None:
        self.config, self.language, self.model, self.tokenizers = config, language, model, tokenizers
        self.train_set, self.val_set, self.compute = train_set, val_set, compute
        self.eval_batch_size = eval_batch_size
        self.parameters = model.trained_parameters()
        self.optimizer = _build_optimizer(config, self.parameters)
        self.order = EpochOrder(len(train_set), config.batch_size, config.seed)
        self.checkpoints = Checkpoints(run)
        self.log = MetricLog(run)
        self.position = Position(epoch=0, step=0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.config.epochs * self.order.num_batches

    def resume(self) -> bool:
        """Go back to the newest checkpoint; False if there is none."""
        name = self.checkpoints.last()
        if name is None:
            self.log.forget_after(self.position.step)
            return False
        self.position = self.checkpoints.position(name)
        self.model.load_trained(self.checkpoints.model(name))
        restore_optimizer(self.optimizer, self.parameters, self.checkpoints.optimizer(name))
        self.log.forget_after(self.position.step)
        return True

    def fit(self, on_step: Report) -> Position:
        """Train to the last epoch and return where the best checkpoint stands."""
        waited = time.perf_counter()
        for epoch, step_in_epoch, batch in self._batches():
            started = time.perf_counter()
            on_step(self._step(epoch, step_in_epoch, batch, data_wait_s=started - waited))
            if step_in_epoch == self.order.num_batches - 1:
                self._finish_epoch(epoch)
            waited = time.perf_counter()
        self.log.close()
        return self.checkpoints.position(self.checkpoints.best())

    def _batches(self) -> Iterator[tuple[int, int, Batch]]:
        """Every batch from the current position to the end, read by one set of workers."""
        places, indices = [], []
        for epoch in range(self.position.epoch, self.config.epochs):
            for step, chosen in enumerate(self.order.batches(epoch)):
                places.append((epoch, step))
                indices.append(chosen)
        batches = feed(self.train_set, indices, self.tokenizers, workers=self.config.workers)
        for (epoch, step), batch in zip(places, batches, strict=True):
            yield epoch, step, batch

    def _step(self, epoch: int, step_in_epoch: int, batch: Batch, *, data_wait_s: float) -> dict[str, float]:
        step = epoch * self.order.num_batches + step_in_epoch
        lr = learning_rate(
            self.config, epoch=epoch, step_in_epoch=step_in_epoch, steps_per_epoch=self.order.num_batches
        )
        started = time.perf_counter()
        losses = self._forward_backward(step, batch)
        _require_finite(losses.total, "loss", step, batch)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip or math.inf)
        _require_finite(norm, "gradient norm", step, batch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        row = {"step": step, "epoch": epoch, "lr": lr, **_scalars(losses), "data_wait_s": data_wait_s}
        row["samples_per_s"] = len(batch.samples) / (time.perf_counter() - started + data_wait_s)
        self.log.write(step, "train", row)
        return row

    def _forward_backward(self, step: int, batch: Batch) -> Losses:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(int(np.random.default_rng([self.config.seed, step]).integers(2**63)))
        frames = _kd_frames(self.config, batch.clips.features.shape[1], step)
        with autocast(self.compute.device, self.compute.dtype):
            return self.model.forward_backward(
                move(batch.clips, self.compute.device), kd_frames=frames, frames_per_run=self.config.frames_per_run
            )

    def _finish_epoch(self, epoch: int) -> None:
        done = epoch + 1
        step = done * self.order.num_batches
        validated = done % self.config.validate_every == 0 or done == self.config.epochs
        top1, loss = self._validate(step) if validated and self.val_set is not None else (None, None)
        alignment = self.model.alignment
        width = None if alignment is None else alignment.target_width
        self.position = Position(done, step, top1, loss, width)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.log.flush()
        self.checkpoints.save(
            self.model.trained_tensors(),
            optimizer_tensors(self.optimizer, names),
            self.position,
            keep=self.config.keep_checkpoints,
        )

    def _validate(self, step: int) -> tuple[float, float]:
        assert self.val_set is not None
        predictions = list(
            predict_batches(
                self.model,
                self._in_order(self.val_set),
                self.tokenizers,
                self.language,
                self.compute.device,
                self.compute.dtype,
            )
        )
        loss = mean_answer_loss(self.model, self._in_order(self.val_set), self.compute.device, self.compute.dtype)
        top1 = sum(prediction.correct for prediction in predictions) / len(predictions)
        self.log.write(step, "val", {"step": step, "top1": top1, "answer_loss": loss})
        return top1, loss

    def _in_order(self, dataset: WindowDataset) -> Iterator[Batch]:
        return feed(dataset, in_order(len(dataset), self.eval_batch_size), self.tokenizers, workers=0)


def in_order(length: int, batch_size: int) -> list[range]:
    """Indices 0..length-1 in batches, the last one possibly smaller."""
    return [range(start, min(start + batch_size, length)) for start in range(0, length, batch_size)]


def _build_optimizer(config: TrainConfig, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW whose decay spares vectors: biases and norms (FACTS.md C.7)."""
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


def _scalars(losses: Losses) -> dict[str, float]:
    row = {"loss": losses.total.item(), "answer_loss": losses.answer.item()}
    if losses.kd is not None and losses.alignment is not None:
        row["kd_loss"] = losses.kd.item()
        row["saturated"] = losses.alignment.saturated.item()
        row["target_to_mean"] = losses.alignment.target_to_mean.item()
        for index, (cosine, weight) in enumerate(
            zip(losses.alignment.cosine.tolist(), losses.alignment.weight.tolist(), strict=True)
        ):
            row[f"cosine/{losses.alignment.levels[index]}"] = cosine
            row[f"weight/{losses.alignment.levels[index]}"] = weight
    return row


def _require_finite(value: Tensor, what: str, step: int, batch: Batch) -> None:
    if not math.isfinite(value.item()):
        names = ", ".join(sample.id for sample in batch.samples[:8])
        raise UserError(
            f"{what} is {value.item()} at step {step}; nothing was overwritten",
            where=f"samples {names}",
            hint="lower train.lr, or look at these samples' features with `pipeline cache verify`",
        )
