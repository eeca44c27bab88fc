"""A run's numbers over time: `metrics.jsonl` to read by program, and trackers to look at: TensorBoard, W&B."""

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from stages.atomic import atomic_write_text
from stages.errors import UserError

FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Shows curves somewhere."""

    def scalars(self, split: str, row: Mapping[str, float], step: int) -> None:
        """Take in a row of numbers."""

    def flush(self) -> None:
        """Hand over what was taken in."""

    def close(self) -> None:
        """End; nothing comes after it."""


class TensorBoard:
    """Event files in `<run>/tensorboard`.

    Args:
        run: folder of the run.
        first_step: events of earlier processes from this step on are to be forgotten.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def scalars(self, split: str, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandB:
    """A run at Weights & Biases; where and whether it is sent says wandb's own environment (WANDB_MODE=offline).

    A resumed training goes on with the same run there; steps that it repeats are shown twice.

    Args:
        run: folder of the run, whose name is the run's.
        project: project there.
    """

    def __init__(self, run: Path, project: str) -> None:
        require_wandb()
        import wandb

        file = run / "wandb-id.txt"
        if not file.exists():
            atomic_write_text(file, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project, name=run.name, id=file.read_text(encoding="utf-8"), dir=str(run), resume="allow"
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, split: str, row: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in row.items()}})

    def flush(self) -> None:
        """See `Tracker.flush`; wandb sends by itself."""

    def close(self) -> None:
        self._run.finish()


def require_wandb() -> None:
    """UserError if wandb is not installed."""
    from importlib.util import find_spec

    if find_spec("wandb") is None:
        raise UserError(
            "wandb is not installed",
            where="train.trackers",
            hint='install it with pip install "diff-lmm[wandb]", or leave it out',
        )


class MetricLog:
    """Appends rows of numbers; one row per training step and per validation.

    Args:
        run: folder of the run.
        trackers: names of what else shows them.
        project: of Weights & Biases.
    """

    def __init__(self, run: Path, trackers: Sequence[str] = (), *, project: str = "") -> None:
        self.run, self.path = run, run / FILE
        self._names, self._project = trackers, project
        self._file: IO[str] | None = None
        self._trackers: list[Tracker] = []

    def write(self, step: int, split: str, row: dict[str, Any]) -> None:
        """Append one row; `split` is "train" or "val"."""
        if self._file is None:
            self._open(step)
        assert self._file is not None
        self._file.write(json.dumps({"split": split, **row}) + "\n")
        self._file.flush()
        curves = {name: value for name, value in row.items() if name != "step"}
        for tracker in self._trackers:
            tracker.scalars(split, curves, step)

    def forget_after(self, step: int, *, validated: bool) -> None:
        """Drop what a run that is resumed at `step` will write again, and a torn last line.

        Args:
            step: steps taken; the rows of later ones go.
            validated: whether the validation at this step is behind it, too.
        """
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                # A kill in the middle of a write leaves half a line, and only at the end.
                break
            if row["step"] < step or (validated and row["split"] == "val" and row["step"] == step):
                kept.append(line + "\n")
        atomic_write_text(self.path, "".join(kept))

    def flush(self) -> None:
        """Hand everything written so far to the operating system; rows are handed over one by one."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Flush and close; a later write opens the files again."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def _open(self, step: int) -> None:
        self._file = self.path.open("a", encoding="utf-8")
        for name in self._names:
            self._trackers.append(
                WandB(self.run, self._project) if name == "wandb" else TensorBoard(self.run, first_step=step)
            )
