"""Where the time of a training step goes: a trace of some steps, and what reading, each network and the rest took."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from model.spans import ALIGNMENT, BACKWARD, LANGUAGE, OPTIMIZER, QFORMER, Clock
from stages.train import READ, STEP

# The first steps ask the system for memory and start the readers.
WARM_UP_STEPS, MEASURED_STEPS = 2, 3
TRACE = "trace.json.gz"
_PARTS = (QFORMER, ALIGNMENT, LANGUAGE, BACKWARD, OPTIMIZER)


@dataclass(frozen=True)
class Breakdown:
    """Seconds per step, on the mean over `steps` steps, by part; `other` is what of the step no part accounts for."""

    steps: int
    seconds: dict[str, float]

    @property
    def step_s(self) -> float:
        """The whole step, waiting for its batch included."""
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, object]:
        """For a file."""
        return {**asdict(self), "step_s": self.step_s}


class StepProfile:
    """Watches some steps of a training; each part waits for the device, so these steps are a little slower.

    Args:
        folder: where the trace goes.
        device: that the networks run on.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.breakdown: Breakdown | None = None
        cuda = device.type == "cuda"
        self._clock = Clock(synchronise=torch.cuda.synchronize if cuda else _nothing)
        self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
        self._open = ExitStack()
        self._steps = 0

    def after_step(self) -> None:
        """Say that a step has been taken."""
        self._steps += 1
        if self._steps == WARM_UP_STEPS:
            self._open.enter_context(self._clock.running())
            self._open.enter_context(self._profiler)
        elif self._steps == WARM_UP_STEPS + MEASURED_STEPS:
            self.finish()

    def finish(self) -> None:
        """Write the trace, if any step was watched and it is not written yet."""
        measured = self._steps - WARM_UP_STEPS
        if measured < 1 or self.breakdown is not None:
            return
        self._open.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.folder / TRACE))
        per_step = {name: seconds / measured for name, seconds in self._clock.seconds.items()}
        parts = {READ: per_step[READ], **{name: per_step.get(name, 0.0) for name in _PARTS}}
        other = per_step[STEP] - sum(parts[name] for name in _PARTS)
        self.breakdown = Breakdown(measured, {**parts, "other": other})


def _nothing() -> None:
    """A CPU has done what it was asked when it returns."""
