"""Ray Train around the training loop: one process per GPU, all of them started again when one dies.

What crosses between the processes and the command is small: lines to show, a row of numbers per step, the wish to
stop. Checkpoints and metrics are written by the first process into the run's folder, which all nodes must see.
"""

import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import TextIOBase
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from stages import own_code
from stages.cluster.connect import last_line
from stages.cluster.shares import Seats
from stages.device import pick_device
from stages.errors import UserError
from stages.train.group import ProcessGroup

# What Ray Train would do beside running the processes: move them to another directory, keep statistics of its own.
_QUIET = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_METRICS_ENABLED": "0"}
_SCRATCH = ".ray-train-"
_LOOK_S = 0.3
# So often may the processes die one after the other without a step further on: then it is not chance.
_DEATHS_IN_A_ROW = 3
_CONTROLLER_FAILURES = 3
# Rank 0 may write a checkpoint meanwhile, or all read a large model from a slow disk.
_COLLECTIVE_LIMIT_S = 3600
_SHOWN_CHARS = 300
_PATIENCE_S = 60.0
_WAITING = "still waiting for the training processes: they load the networks, or the cluster has no room (`ray status`)"


class Desk:
    """Where the processes leave what they have to say and the command what it wants; an actor of its own."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.stop = False
        self.step, self.starts_here, self.cause = -1, 0, ""

    def say(self, what: Any) -> None:
        """Leave something for the command."""
        self.said.append(what)

    def collect(self) -> list[Any]:
        """Everything that was left since the last call, in order."""
        said, self.said = self.said, []
        return said

    def ask_to_stop(self) -> None:
        """Let the processes know that they are to stop."""
        self.stop = True

    def asked_to_stop(self) -> bool:
        """Whether they are."""
        return self.stop

    def died(self, cause: str) -> None:
        """Remember what a process died of; the first of several says most."""
        self.cause = self.cause or cause

    def start(self, step: int) -> str | None:
        """Note that the processes start at a step; what they died of if that has been so too often, else None."""
        self.starts_here = self.starts_here + 1 if step == self.step else 1
        self.step, cause = step, self.cause or "a process was killed, or ran out of memory"
        self.cause = ""
        return cause if self.starts_here > _DEATHS_IN_A_ROW else None


@dataclass(frozen=True)
class Line:
    """A line for people."""

    text: str


@dataclass(frozen=True)
class Start:
    """The processes start, or start again, after so many of so many steps."""

    step: int
    total: int


@dataclass(frozen=True)
class Refusal:
    """A `UserError` of one of the processes."""

    text: str
    exit_code: int


Row = dict[str, float]
"""One step's numbers."""


class Member:
    """One of the processes, as its work sees it.

    Args:
        desk: the actor.
        group: all of them.
    """

    def __init__(self, desk: Any, group: ProcessGroup) -> None:
        self.desk, self.group = desk, group

    def asked_to_stop(self) -> bool:
        """Whether the command wants to stop; the first process asks, and it is for all."""
        return self.group.rank == 0 and bool(ray.get(self.desk.asked_to_stop.remote()))

    def start(self, step: int, total: int) -> None:
        """Tell that training goes on at a step.

        Raises:
            UserError: the processes have died at this step too often.
        """
        if self.group.rank == 0:
            cause = ray.get(self.desk.start.remote(step))
            if cause is not None:
                raise UserError(
                    f"the training processes died {_DEATHS_IN_A_ROW} times after step {step}; the last time: {cause}",
                    hint="go on by the same command and --resume once that is mended",
                    exit_code=1,
                )
            self.desk.say.remote(Start(step, total))

    def row(self, row: Row) -> None:
        """Tell of a step; the first process does, for all."""
        if self.group.rank == 0:
            self.desk.say.remote(row)

    @contextmanager
    def voice(self) -> Iterator[None]:
        """What the first process writes to stderr is shown by the command."""
        if self.group.rank:
            yield
            return
        with redirect_stderr(_Forwarded(self.desk)):
            yield


class _Forwarded(TextIOBase):
    """A text stream whose lines go to the desk."""

    def __init__(self, desk: Any) -> None:
        self._desk, self._open = desk, ""

    def write(self, text: str) -> int:
        *lines, self._open = (self._open + text).split("\n")
        for line in lines:
            self._desk.say.remote(Line(line))
        return len(text)


Work = Callable[[str, Member], str]
"""Does an order in one process and returns what came out; that of the first process counts."""


def train_together(
    work: Work,
    order: str,
    seats: Seats,
    *,
    scratch: Path,
    stop: Callable[[], bool],
    on_said: Callable[[Line | Start | Row], None],
) -> str | None:
    """Have an order done by several processes, inside `stages.cluster.connect.cluster`; what the first of them
    returned.

    When one dies, all are ended and started again: the work has to go on from what is on disk. None if they were asked
    to stop before they had begun: they may be waiting for a place for ever.

    Args:
        work: what does it, in each process.
        order: what to do.
        seats: how many processes, with what.
        scratch: folder that all nodes see; Ray Train's own files are there for the time of the call.
        stop: asked again and again whether they shall stop.
        on_said: told what the processes say.

    Raises:
        UserError: one of the processes raised it, or they die again and again at one place, or cannot be started.
    """
    desk = ray.remote(Desk).options(num_cpus=0).remote()
    for killed in scratch.glob(f"{_SCRATCH}*"):
        shutil.rmtree(killed, ignore_errors=True)
    # Ray tells of processes that die on stdout, which belongs to machines.
    with tempfile.TemporaryDirectory(dir=scratch, prefix=_SCRATCH) as storage, redirect_stdout(sys.stderr):
        fitting = _Fitting(_trainer(work, order, seats, desk, str(Path(storage).resolve())))
        fitting.start()
        asked = begun = ended = False
        patient_until_s = time.monotonic() + _PATIENCE_S
        while not ended:
            fitting.join(_LOOK_S)
            ended = not fitting.is_alive()
            if stop() and not asked:
                asked = True
                desk.ask_to_stop.remote()
            for said in ray.get(desk.collect.remote()):
                if isinstance(said, Refusal):
                    raise UserError(said.text, exit_code=said.exit_code)
                begun, patient_until_s = begun or isinstance(said, Start), math.inf
                on_said(said)
            if asked and not begun:
                return None
            if time.monotonic() > patient_until_s:
                patient_until_s = math.inf
                on_said(Line(_WAITING))
        return fitting.outcome()


@dataclass(eq=False)
class _Fitting(threading.Thread):
    """Ray Train's blocking call, in a thread, so that signals reach the command and not Ray."""

    trainer: Any
    answer: list[str] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def run(self) -> None:
        from ray.train import TrainingFailedError

        try:
            self.answer.append(self.trainer.fit().return_value)
        except (TrainingFailedError, RayError) as error:
            self.error = error

    def outcome(self) -> str:
        if self.error is not None or self.answer[0] is None:
            said = last_line(self.error)[:_SHOWN_CHARS] if self.error is not None else "they returned nothing"
            raise UserError(
                f"the training processes could not be started or went away: {said}",
                hint="go on by the same command and --resume",
                exit_code=1,
            )
        return self.answer[0]


def _trainer(work: Work, order: str, seats: Seats, desk: Any, storage: str) -> Any:
    os.environ.update(_QUIET)
    # Ray Train imports pandas and pyarrow, which training by one process does not need.
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    code = own_code.digest()

    def loop() -> str:
        torch.set_num_threads(seats.cores)
        try:
            own_code.require_same(code)
            return work(order, Member(desk, ProcessGroup(pick_device())))
        except UserError as error:
            ray.get(desk.say.remote(Refusal(str(error), error.exit_code)))
            raise
        except Exception as error:
            ray.get(desk.died.remote(" ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN_CHARS]))
            raise

    return TorchTrainer(
        loop,
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_LIMIT_S),
        scaling_config=train.ScalingConfig(
            num_workers=seats.processes,
            use_gpu=seats.gpus > 0,
            resources_per_worker={"CPU": seats.cpus, **({"GPU": seats.gpus} if seats.gpus else {})},
        ),
        run_config=train.RunConfig(
            name="training",
            storage_path=storage,
            # How often is enough is the desk's to say.
            failure_config=train.FailureConfig(max_failures=-1, controller_failure_limit=_CONTROLLER_FAILURES),
            logging_config=train.LoggingConfig(log_level="CRITICAL"),
        ),
    )
