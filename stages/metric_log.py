"""A run's numbers over time: `metrics.jsonl` to read by program, TensorBoard events to look at."""

import json
from pathlib import Path
from typing import IO

from torch.utils.tensorboard import SummaryWriter

from stages.atomic import atomic_write_text

FILE = "metrics.jsonl"


class MetricLog:
    """Appends rows of numbers; one row per training step and per validation.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FILE
        self._events_folder = run / "tensorboard"
        self._file: IO[str] | None = None
        self._events: SummaryWriter | None = None

    def write(self, step: int, split: str, row: dict[str, float]) -> None:
        """Append one row; `split` is "train" or "val"."""
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        if self._events is None:
            self._events = SummaryWriter(str(self._events_folder), purge_step=step)
        self._file.write(json.dumps({"split": split, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(f"{split}/{name}", value, step)

    def forget_after(self, step: int) -> None:
        """Drop training rows of steps from `step` on, which a resumed run will write again, and a torn last line."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                # A kill in the middle of a write leaves half a line, and only at the end.
                break
            if row["step"] < step or (row["split"] == "val" and row["step"] == step):
                kept.append(line + "\n")
        atomic_write_text(self.path, "".join(kept))

    def flush(self) -> None:
        """Hand the TensorBoard events written so far to the operating system; rows are handed over one by one."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close; a later write opens the files again."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None
