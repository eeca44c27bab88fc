"""Checkpoints of a run: trained parameters and optimizer state as safetensors, position as JSON; whole or absent.

<run>/checkpoints/step-00000120/{model.safetensors, optimizer.safetensors, state.json, checksums.json}
<run>/checkpoints/index.json      which one is the newest and which the best

What else a training is made of is a function of the position: the order of samples and the frames they show, dropout,
the learning rate. So these files are enough to go on from any step as if nothing had happened.
"""

import contextlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from stages.atomic import atomic_write_text, sync, usual_permissions
from stages.errors import UserError

BestBy = Literal["accuracy", "loss"]
OfEquals = Literal["other", "first"]

_MODEL, _OPTIMIZER, _STATE, _INDEX = "model.safetensors", "optimizer.safetensors", "state.json", "index.json"
_CHECKSUMS = "checksums.json"
_READ_BYTES = 2**24


@dataclass(frozen=True)
class Position:
    """Where a checkpoint stands, and what validation measured there.

    Attributes:
        epoch: epochs finished, validation included.
        step: optimizer steps taken; more than those of the finished epochs where it was saved within one.
        val_top1: accuracy on the validation split, in [0, 1]; None if not validated here.
        val_loss: Eq. 8 on the validation split; None if not validated here.
        target_width: D of the teacher targets; None without distillation.
        best_step: step of the best checkpoint so far; None means this one.
        stale: validations since the best one.
    """

    epoch: int
    step: int
    val_top1: float | None = None
    val_loss: float | None = None
    target_width: int | None = None
    best_step: int | None = None
    stale: int = 0

    def better_than(self, other: "Position", by: BestBy = "accuracy", of_equals: OfEquals = "other") -> bool:
        """Higher accuracy, then lower loss (or the other way round), then later; validated is better than not.

        With `first`, of validated positions that are equal in what is looked at neither is better.
        """
        return self._merit(by, of_equals) > other._merit(by, of_equals)

    def _merit(self, by: BestBy, of_equals: OfEquals) -> tuple[float, ...]:
        top1 = -1.0 if self.val_top1 is None else self.val_top1
        loss = -math.inf if self.val_loss is None or not math.isfinite(self.val_loss) else -self.val_loss
        looked_at, other = (top1, loss) if by == "accuracy" else (loss, top1)
        if of_equals == "first" and self.val_top1 is not None:
            return (looked_at, 0.0)  # more than what is not validated has here
        return (looked_at, other, self.step)


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "checkpoints"

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], position: Position, *, keep: int) -> None:
        """Write a checkpoint, then point `index.json` at it, then remove the old ones.

        The newest `keep` stay, and what was the best at each of them, so that going back to one finds its best, too.
        """
        name = _name(position.step)
        final = self.folder / name
        with self._temporary(name) as temporary:
            own = {key: value.detach().cpu().contiguous() for key, value in model.items()}
            for part, tensors in ((_MODEL, own), (_OPTIMIZER, optimizer)):
                with usual_permissions(temporary / part):
                    save_file(tensors, temporary / part)
            (temporary / _STATE).write_text(json.dumps(asdict(position)), encoding="utf-8")
            sums = {file: _crc32(temporary / file) for file in (_MODEL, _OPTIMIZER, _STATE)}
            (temporary / _CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
            for file in temporary.iterdir():
                sync(file)
            if final.exists():  # saved at this step before, by a run that was stopped or resumed
                final.rename(self.folder / f".{name}.old.tmp")
            temporary.rename(final)
        sync(self.folder)
        self._point_at(name, position)
        self._prune(keep)

    def resume(self, on_damaged: Callable[[str], None]) -> str | None:
        """Name of the newest checkpoint that is whole, which counts as the newest from now on; None if there is none.

        Args:
            on_damaged: called with one line about each newer one that is not; it is kept as `damaged-<name>`.
        """
        for name in reversed(self._names()):
            try:
                self._require_whole(name)
                position = self.position(name)
            except UserError as error:
                on_damaged(f"{error}. Going back to the checkpoint before it")
                self._set_aside(name)
                continue
            self._point_at(name, position)
            return name
        return None

    def last(self) -> str | None:
        """Name of the newest checkpoint; None if there is none."""
        return self._read_index().get("last")

    def best(self) -> str:
        """Name of the best checkpoint.

        Raises:
            UserError: the run has no checkpoint.
        """
        name = self._read_index().get("best")
        if name is None:
            raise UserError("the run has no checkpoint", where=self.run, hint="train it first: pipeline train")
        return name

    def position(self, name: str) -> Position:
        """Where the checkpoint stands."""
        path = self.folder / name / _STATE
        try:
            return Position(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(path, error) from error

    def model(self, name: str) -> dict[str, Tensor]:
        """The trained parameters."""
        return _load(self.folder / name / _MODEL)

    def optimizer(self, name: str) -> dict[str, Tensor]:
        """The optimizer's state, as `optimizer_tensors` wrote it."""
        return _load(self.folder / name / _OPTIMIZER)

    @contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        """A folder to write into; it is removed when writing fails, and at the next save when the process was killed.

        Raises:
            UserError: the disk is full.
        """
        for interrupted in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(interrupted)
        temporary = self.folder / f".{name}.tmp"
        temporary.mkdir(parents=True)
        try:
            yield temporary
        except SafetensorError as error:
            # Its own kind of error for whatever the system reports.
            raise UserError(
                f"the checkpoint cannot be written: {error}",
                where=self.folder,
                hint="free space there, then go on with --resume",
                exit_code=1,
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _set_aside(self, name: str) -> None:
        aside = self.folder / f"damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / name).rename(aside)

    def _point_at(self, name: str, position: Position) -> None:
        best = name if position.best_step is None else _name(position.best_step)
        try:
            self.position(best)
        except UserError:  # damaged, or removed by hand
            best = name
        atomic_write_text(self.folder / _INDEX, json.dumps({"last": name, "best": best}))

    def _read_index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        if not path.is_file():
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            return {key: str(index[key]) for key in ("last", "best")}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from error

    def _names(self) -> list[str]:
        """Names of the checkpoints, oldest first."""
        return sorted(path.name for path in self.folder.glob("step-*"))

    def _prune(self, keep: int) -> None:
        names = self._names()
        kept = set(names[-keep:]) | set(self._read_index().values())
        for name in names[-keep:]:
            with contextlib.suppress(UserError):  # a damaged one has no best that anybody could go back to
                kept.add(_name(best) if (best := self.position(name).best_step) is not None else name)
        for name in names:
            if name not in kept:
                shutil.rmtree(self.folder / name)
        for replaced in self.folder.glob(".step-*.old.tmp"):
            shutil.rmtree(replaced)

    def _require_whole(self, name: str) -> None:
        """UserError unless every file of the checkpoint has the bytes that were written."""
        path = self.folder / name / _CHECKSUMS
        try:
            sums = json.loads(path.read_text(encoding="utf-8"))
            for file in (_MODEL, _OPTIMIZER, _STATE):
                if _crc32(self.folder / name / file) != sums[file]:
                    raise UserError("checkpoint file is damaged", where=path.parent / file)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            total = zlib.crc32(block, total)
    return total


def optimizer_tensors(optimizer: Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """Flatten an optimizer's per-parameter state to `<parameter>|<field>`; `names` maps id(parameter) to its name."""
    return {
        f"{names[id(parameter)]}|{field}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for field, value in state.items()
    }


def restore_optimizer(
    optimizer: Optimizer, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took out."""
    for key, value in tensors.items():
        name, _, field = key.rpartition("|")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU, the moments beside the parameter.
        optimizer.state[parameter][field] = value if field == "step" else value.to(parameter.device)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint file cannot be read: {error}",
        where=path,
        hint="`pipeline train --resume` goes back to the one before it",
    )
