"""Checkpoints of a run: trained parameters and optimizer state as safetensors, position as JSON; whole or absent.

<run>/checkpoints/step-00000120/{model.safetensors, optimizer.safetensors, state.json}
<run>/checkpoints/index.json      which one is the newest and which the best
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from stages.atomic import atomic_write_text, sync_directory, sync_file
from stages.errors import UserError

_MODEL, _OPTIMIZER, _STATE, _INDEX = "model.safetensors", "optimizer.safetensors", "state.json", "index.json"


@dataclass(frozen=True)
class Position:
    """Where a checkpoint stands: finished epochs and optimizer steps, and what validation said then.

    Attributes:
        epoch: epochs finished.
        step: optimizer steps taken.
        val_top1: accuracy on the validation split, in [0, 1]; None if not validated.
        val_loss: Eq. 8 on the validation split; None if not validated.
        target_width: D of the teacher targets; None without distillation.
    """

    epoch: int
    step: int
    val_top1: float | None = None
    val_loss: float | None = None
    target_width: int | None = None

    def better_than(self, other: "Position") -> bool:
        """Higher validation accuracy, then lower validation loss, then later: unvalidated, the last one is the best."""
        mine, theirs = (
            (-1.0 if position.val_top1 is None else position.val_top1, -(position.val_loss or 0.0), position.step)
            for position in (self, other)
        )
        return mine > theirs


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "checkpoints"

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], position: Position, *, keep: int) -> None:
        """Write a checkpoint, then point `index.json` at it, then remove all but the newest `keep` and the best."""
        name = f"step-{position.step:08d}"
        final = self.folder / name
        with self._temporary(name) as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in model.items()}, temporary / _MODEL)
            save_file(optimizer, temporary / _OPTIMIZER)
            (temporary / _STATE).write_text(json.dumps(asdict(position)), encoding="utf-8")
            for file in temporary.iterdir():
                sync_file(file)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        sync_directory(self.folder)
        index = self._read_index()
        best = index.get("best")
        if best is None or position.better_than(self.position(best)):
            best = name
        atomic_write_text(self.folder / _INDEX, json.dumps({"last": name, "best": best}))
        self._prune(keep, {name, best})

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
            # Its own kind of error for whatever the system says.
            raise UserError(
                f"the checkpoint cannot be written: {error}",
                where=self.folder,
                hint="free space there, then go on with --resume",
                exit_code=1,
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _read_index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        if not path.is_file():
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            return {key: str(index[key]) for key in ("last", "best")}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from error

    def _prune(self, keep: int, always: set[str]) -> None:
        names = sorted(path.name for path in self.folder.glob("step-*"))
        for name in names[:-keep]:
            if name not in always:
                shutil.rmtree(self.folder / name)


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
        f"checkpoint file cannot be read: {error}", where=path, hint="use another checkpoint or train anew"
    )
