"""Stage 2's training loop: what is read, stepped, validated, saved and resumed, in this order.

One seed gives one sequence of losses: the order of samples and the frames that they show are functions of (seed,
epoch), dropout is one of (seed, step). A training that is killed at any moment and resumed is, on a CPU, bit for bit
the one that was not.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch.profiler import record_function

from model.config import LanguageConfig
from model.diff_lmm import DiffLMM, Losses
from stages.batches.feed import feed
from stages.batches.order import EpochOrder
from stages.batches.windows import Batch, Drawn, WindowDataset
from stages.config import EvaluateConfig, TrainConfig
from stages.device import Compute
from stages.errors import UserError
from stages.evaluate.answering import predict_batches, summed_answer_loss
from stages.evaluate.at_once import AtOnce, clip_shape
from stages.networks.checkpoint import Checkpoints, Position, optimizer_tensors, restore_optimizer
from stages.networks.memory_law import Parts
from stages.networks.tokens import Tokenizers
from stages.train.group import Group, SingleProcess
from stages.train.metric_log import MetricLog
from stages.train.parts import bytes_to_come, parts_for
from stages.train.schedule import learning_rate
from stages.train.step import Stepper
from stages.wording import counted

READ, STEP = "read", "step"
"""The spans of waiting for the next batch, and of learning from it."""

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Data:
    """What is learned from and judged by; samples to choose the best epoch by may be absent, then the last is best."""

    train: WindowDataset
    val: WindowDataset | None
    tokenizers: Tokenizers
    evaluate: EvaluateConfig


@dataclass(frozen=True)
class Ending:
    """How a training ended.

    Attributes:
        at: where it stands.
        best: where its best checkpoint stands; None if it was stopped before its first step.
        stopped: somebody asked it to stop before its end.
        early: validation became no better for `train.patience` times.
    """

    at: Position
    best: Position | None
    stopped: bool
    early: bool


@dataclass(frozen=True)
class _Step:
    """One optimizer step to take: its place, its batch in parts, and how long that was waited for."""

    epoch: int
    in_epoch: int
    parts: list[Batch]
    data_wait_s: float


@dataclass
class _Elapsed:
    """What the steps since the last row of numbers took."""

    steps: int = 0
    step_s: float = 0.0
    wait_s: float = 0.0

    def add(self, step_s: float, wait_s: float) -> None:
        """Count one step in."""
        self.steps, self.step_s, self.wait_s = self.steps + 1, self.step_s + step_s, self.wait_s + wait_s

    def rates(self, batch_size: int) -> dict[str, float]:
        """Of the row, over these steps."""
        speed = self.steps * batch_size / (self.step_s + self.wait_s)
        return {"data_wait_s": self.wait_s / self.steps, "samples_per_s": speed}


class _StoppedError(Exception):
    """Validation was left because somebody asked to stop."""


class Trainer:
    """One training run.

    Args:
        config: the recipe.
        language: how validation answers are generated.
        model: as it starts; it stays on its device.
        data: what to learn from.
        run: folder for checkpoints and metrics.
        compute: device and arithmetic.
        stop: asked after every step whether to stop there; the state is saved then.
        group: the processes that share every batch; the first of them writes, all stop where one is asked to.
        on_parts: called with how much goes through the networks at once, at the start and when it has become less.

    Raises:
        UserError: a batch cannot be shared out equally.
    """

    def __init__(
        self,
        config: TrainConfig,
        language: LanguageConfig,
        model: DiffLMM,
        data: Data,
        *,
        run: Path,
        compute: Compute,
        stop: Callable[[], bool],
        group: Group | None = None,
        on_parts: Callable[[dict[str, int]], None] | None = None,
    ) -> None:
        self.config, self.language, self.model, self.data = config, language, model, data
        self.compute, self.stop, self.group = compute, stop, group or SingleProcess()
        self.stepper = Stepper(config, model, compute, self.group)
        videos = [sample.video for sample in data.train.samples]
        near = videos if config.order == "near" else None
        self.order = EpochOrder(len(data.train), config.batch_size, config.seed, near=near)
        if self.order.batch_size % self.group.size:
            samples = counted(self.order.batch_size, "sample")
            raise UserError(
                f"a batch has {samples}, which {self.group.size} processes cannot share equally",
                where="train.batch_size",
                hint="make it a multiple of --processes",
            )
        self.checkpoints = Checkpoints(run)
        self.log = MetricLog(run, config.trackers, project=config.wandb_project)
        self.on_parts, self.at_once = on_parts, AtOnce.of(data.evaluate)
        self._val_batch = self.at_once.samples
        self.position = Position(epoch=0, step=0)
        self.best: Position | None = None
        self._since_row = _Elapsed()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.config.epochs * self.order.num_batches

    @property
    def out_of_patience(self) -> bool:
        """Whether validation has become no better for as long as `train.patience` allows."""
        return self.config.patience is not None and self.position.stale >= self.config.patience

    def resume(self, on_damaged: Callable[[str], None]) -> bool:
        """Go back to the newest whole checkpoint; False if there is none.

        Args:
            on_damaged: called with a line on each checkpoint that is passed over.

        Raises:
            UserError: the newest is of another model.
        """
        # The first process alone may put a damaged one aside.
        found = self.checkpoints.resume(on_damaged) if self.group.rank == 0 else None
        name = next(iter(self.group.texts([] if found is None else [found])), None)
        if name is not None:
            self._load(name)
            self.position = self.checkpoints.position(name)
            self.best = self.checkpoints.position(self.checkpoints.best())
            restore_optimizer(self.stepper.optimizer, self.stepper.parameters, self.checkpoints.optimizer(name))
        validated = self.position.step == self.position.epoch * self.order.num_batches
        if self.group.rank == 0:
            self.log.forget_after(self.position.step, validated=validated)
        return name is not None

    def _load(self, name: str) -> None:
        """Take a checkpoint's parameters; UserError unless they are exactly the model's."""
        tensors, own = self.checkpoints.model(name), self.model.trained_tensors()
        shapes, theirs = ({key: tuple(t.shape) for key, t in one.items()} for one in (own, tensors))
        for key in sorted(shapes.keys() | theirs.keys()):
            if shapes.get(key) != theirs.get(key):
                raise UserError(
                    f"this checkpoint is of another model: {key} is {theirs.get(key, 'not in it')}",
                    where=self.checkpoints.folder / name,
                    allowed=str(shapes.get(key, "not in the model")),
                    hint="remove it to go back to the one before, or start a new run with another --name",
                )
        self.model.load_trained(tensors)

    def fit(self, on_step: Report) -> Ending:
        """Train until the last epoch, until validation becomes no better, or until asked to stop."""
        try:
            self._settle_parts()
            if self._epoch_is_full():  # what was asked to stop before its validation
                self._end_epoch()
            for step in self._steps():
                self._take(step, on_step)
                stopping = self._all_stop()
                if self._epoch_is_full():
                    self._end_epoch()
                    stopping = self._all_stop()
                elif stopping or self._save_is_due():
                    self._save()
                if stopping or self.out_of_patience:
                    break
        finally:
            self.log.close()
        return self._ending()

    def _settle_parts(self) -> None:
        """Decide how much goes through the networks at once, and try on a GPU whether it fits."""
        data, stepper, device = self.data, self.stepper, self.compute.device
        own = self.order.batch_size // self.group.size
        samples = [*data.train.samples, *(data.val.samples if data.val else ())]
        shape = clip_shape(data.train, samples, data.tokenizers, self.model.qformer.num_queries)
        moments = bool(stepper.optimizer.state)
        parts = parts_for(
            self.config,
            self.model,
            shape,
            self.compute,
            samples=own,
            quantize=self.language.quantize,
            with_moments=moments,
        )
        stepper.parts = self._agreed(parts)
        whole_language = self.config.shard_language == "none"
        if self.config.micro_batch_size == "auto" and device.type == "cuda" and whole_language:
            texts = [len(one.prompt) + len(one.question) + len(one.answer) for one in data.train.samples]
            longest = sorted(range(len(texts)), key=texts.__getitem__)[-stepper.parts.clips :]
            stepper.try_parts(next(feed(data.train, [longest], data.tokenizers, workers=0)))
            stepper.parts = self._agreed(stepper.parts)
        to_come = bytes_to_come(self.model, with_moments=moments)
        found = AtOnce.that_fits(self.model, shape, self.language, data.evaluate, device, to_come=to_come)
        # All have to ask the model for a validation equally often.
        self._val_batch = self._least(found.samples)
        self.at_once = replace(found, samples=self._val_batch, may_halve=whole_language)
        stepper.on_smaller = self._report_parts
        self._report_parts()

    def _agreed(self, parts: Parts) -> Parts:
        return Parts(self._least(parts.clips), self._least(parts.frames))

    def _least(self, number: int) -> int:
        """The least of all processes'."""
        return min(map(int, self.group.texts([str(number)])))

    def _report_parts(self) -> None:
        if self.on_parts is not None and self.group.rank == 0:
            parts, samples = self.stepper.parts, self.at_once.samples
            self.on_parts(
                {
                    "train.micro_batch_size": parts.clips,
                    "train.frames_per_chunk": parts.frames,
                    "evaluate.batch_size": samples,
                }
            )

    def _steps(self) -> Iterator[_Step]:
        """Every step from the current position to the end, read by one set of workers."""
        places = list(self._places())
        if not places or self.out_of_patience or self._all_stop():
            return
        own = self.order.batch_size // self.group.size
        size = self.stepper.parts.clips
        batches = feed(
            self.data.train,
            self._parts(size),
            self.data.tokenizers,
            workers=self.config.loader_workers,
            prefetch=self.config.prefetch,
        )
        num_parts = -(-own // size)
        for epoch, in_epoch in places:
            started = time.perf_counter()
            with record_function(READ):
                parts = list(islice(batches, num_parts))
            yield _Step(epoch, in_epoch, parts, data_wait_s=time.perf_counter() - started)

    def _places(self) -> Iterator[tuple[int, int]]:
        """Epoch and step within it of every step that is left."""
        for step in range(self.position.step, self.total_steps):
            yield divmod(step, self.order.num_batches)

    def _all_stop(self) -> bool:
        """Whether any of the processes is asked to stop."""
        return bool(self.group.sum(torch.tensor(int(self.stop()))))

    def _parts(self, size: int) -> Iterator[list[Drawn]]:
        """The samples of every part of this process's share of every batch that is left."""
        first_epoch, done = divmod(self.position.step, self.order.num_batches)
        for epoch in range(first_epoch, self.config.epochs):
            for batch in self.order.batches(epoch)[done if epoch == first_epoch else 0 :]:
                drawn = self._drawn(batch, epoch)
                for start in range(0, len(drawn), size):
                    yield drawn[start : start + size]

    def _drawn(self, batch: list[int], epoch: int) -> list[Drawn]:
        """The samples of this process's share of a batch."""
        own = self.order.batch_size // self.group.size
        return [Drawn(index, self.config.seed, epoch) for index in batch[self.group.rank * own :][:own]]

    def _take(self, step: _Step, on_step: Report) -> None:
        started = time.perf_counter()
        number = step.epoch * self.order.num_batches + step.in_epoch
        lr = learning_rate(
            self.config, epoch=step.epoch, step_in_epoch=step.in_epoch, steps_per_epoch=self.order.num_batches
        )
        with record_function(STEP):
            losses = self.stepper.take(number, lr, step.parts)
        self.position = replace(self.position, step=number + 1, val_top1=None, val_loss=None)
        row: dict[str, float] = {"step": number, "epoch": step.epoch, "lr": lr}
        is_logged = self.position.step % self.config.log_every == 0 or self._epoch_is_full()
        if is_logged:
            self._require_finite()
            row |= _scalars(losses)
        self._since_row.add(time.perf_counter() - started, step.data_wait_s)
        if is_logged:
            row |= self._since_row.rates(self.order.batch_size)
            self._since_row = _Elapsed()
            self._write(number, "train", row)
        on_step(row)

    def _require_finite(self) -> None:
        """UserError if a loss or gradient since the start was not finite; its samples are read again to name them."""
        found = self.stepper.bad_step()
        if found is None:
            return
        step, what = found
        epoch, in_epoch = divmod(step, self.order.num_batches)
        drawn = self._drawn(self.order.batches(epoch)[in_epoch], epoch)
        again = feed(self.data.train, [drawn], self.data.tokenizers, workers=0)
        self.stepper.refuse(f"{what} at step {step}; nothing was overwritten", list(again))

    def _write(self, step: int, split: str, row: dict[str, float]) -> None:
        if self.group.rank == 0:
            self.log.write(step, split, row)

    def _epoch_is_full(self) -> bool:
        """Whether all steps of the current epoch are taken."""
        return self.position.step == (self.position.epoch + 1) * self.order.num_batches

    def _save_is_due(self) -> bool:
        every = self.config.save_every_steps
        return every is not None and self.position.step % every == 0

    def _end_epoch(self) -> None:
        """Validate and save; asked to stop meanwhile, save alone, and the validation comes first on resuming."""
        epoch = self.position.epoch + 1
        try:
            top1, loss = self._validate() if self._validation_is_due(epoch) else (None, None)
            self.position = replace(self.position, epoch=epoch, val_top1=top1, val_loss=loss)
        except _StoppedError:
            # The epoch stays open: `fit` begins with its validation when the run is resumed, and says that it stopped.
            assert self.position.epoch == epoch - 1
        except UserError:  # of the validation's data: what was learned is no worse for it
            self._save()
            raise
        self._save()

    def _validation_is_due(self, epoch: int) -> bool:
        due = epoch % self.config.validate_every == 0 or epoch == self.config.epochs
        return due and self.data.val is not None

    def _validate(self) -> tuple[float, float]:
        compute = (self.compute.device, self.compute.dtype)
        found = predict_batches(
            self.model, self._val_batches(), self.data.tokenizers, self.language, *compute, self.at_once
        )
        right = [prediction.correct for prediction in found]
        loss, tokens = summed_answer_loss(self.model, self._val_batches(), *compute, self.at_once)
        sums = torch.tensor([sum(right), len(right), loss, tokens], dtype=torch.float64)
        correct, samples, loss, tokens = (self.group.sum(sums) if self._validation_is_shared else sums).tolist()
        row = {"step": self.position.step, "top1": correct / samples, "answer_loss": loss / tokens}
        self._write(self.position.step, "val", row)
        return row["top1"], row["answer_loss"]

    @property
    def _validation_is_shared(self) -> bool:
        """Whether each process takes its part of the validation samples.

        With a sharded language model everyone has to ask it equally often, and so all do the same.
        """
        return self.config.shard_language == "none"

    def _val_batches(self) -> Iterator[Batch]:
        """This process's batches of the validation split; all processes ask before each round whether to stop."""
        assert self.data.val is not None
        batches = in_order(len(self.data.val), self._val_batch)
        rank, size = (self.group.rank, self.group.size) if self._validation_is_shared else (0, 1)
        read = feed(self.data.val, batches[rank::size], self.data.tokenizers, workers=0)
        for _ in range(0, len(batches), size):
            if self._all_stop():
                raise _StoppedError
            yield from islice(read, 1)

    def _save(self) -> None:
        self._require_finite()
        self.position = self._judged(self.position)
        if self.group.rank != 0:
            return
        names = {id(parameter): name for name, parameter in self.stepper.parameters.items()}
        self.log.flush()
        self.checkpoints.save(
            self.model.trained_tensors(),
            optimizer_tensors(self.stepper.optimizer, names),
            self.position,
            keep=self.config.keep_checkpoints,
        )

    def _judged(self, position: Position) -> Position:
        """The position with what is known of the best one at this moment."""
        alignment = self.model.alignment
        position = replace(position, target_width=None if alignment is None else alignment.target_width)
        by = self.config.best_by, self.config.best_of_equals
        if self.best is None or position.better_than(replace(self.best, step=position.step), *by):
            position = replace(position, stale=0)
        elif position.val_loss is not None:
            position = replace(position, stale=position.stale + 1)
        # Of equals the later one is kept, but it is no gain that patience waits for.
        if self.best is None or position.better_than(self.best, *by):
            self.best = replace(position, best_step=None)
            return self.best
        return replace(position, best_step=self.best.step)

    def _ending(self) -> Ending:
        done = self.position.epoch == self.config.epochs
        early = self.out_of_patience and not done
        return Ending(self.position, self.best, stopped=not done and not early, early=early)


def in_order(length: int, batch_size: int) -> list[range]:
    """Indices 0..length-1 in batches, the last one possibly smaller."""
    return [range(start, min(start + batch_size, length)) for start in range(0, length, batch_size)]


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
