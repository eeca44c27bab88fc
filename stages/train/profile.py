"""Where the time of a training step goes: a trace of some steps, and what reading, each network and the rest took."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from model.spans import ALIGNMENT, BACKWARD, LANGUAGE, OPTIMIZER, QFORMER
from stages.train.trainer import READ, STEP

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
    """Watches some steps of a training with torch's profiler, which makes these steps a little slower.

    On a GPU a network's seconds are those of its work there; elsewhere, and for reading, they are the CPU's.

    Args:
        folder: where the trace goes.
        device: that the networks run on.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.breakdown: Breakdown | None = None
        self._on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profiler = profile(activities=activities)
        self._steps = 0

    def after_step(self) -> None:
        """Count a step, and start or end the watching."""
        self._steps += 1
        if self._steps == WARM_UP_STEPS:
            self._profiler.start()
        elif self._steps == WARM_UP_STEPS + MEASURED_STEPS:
            self.finish()

    def finish(self) -> None:
        """Write the trace, if any step was watched and it is not written yet."""
        measured = self._steps - WARM_UP_STEPS
        if measured < 1 or self.breakdown is not None:
            return
        self._profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.folder / TRACE))
        spans = {event.key: event for event in self._profiler.key_averages()}
        on_cpu = {name: spans[name].cpu_time_total for name in (READ, STEP)}
        parts = {name: self._microseconds(spans.get(name)) for name in _PARTS}
        parts = {READ: on_cpu[READ], **parts, "other": on_cpu[STEP] - sum(parts.values())}
        self.breakdown = Breakdown(measured, {name: value / 1e6 / measured for name, value in parts.items()})

    def _microseconds(self, span: FunctionEventAvg | None) -> float:
        if span is None:
            return 0.0
        return float(span.device_time_total if self._on_gpu else span.cpu_time_total)
