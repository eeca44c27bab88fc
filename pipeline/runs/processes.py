"""One run, trained by several processes: started by `pipeline train --processes`, or by `torchrun` or `srun`."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.runs.cached_data import find_training_data
from pipeline.runs.run_folder import CONFIG
from pipeline.runs.training import Outcome
from pipeline.screen.console import PEOPLE, say, silence
from pipeline.settings.config import PipelineConfig, Resolved
from stages import own_code
from stages.atomic import atomic_write_text
from stages.device import usable_cores
from stages.errors import UserError
from stages.networks.checkpoint import Checkpoints
from stages.process_tree import end_descendants
from stages.signals import StopRequest, interruption_note, leave_line_to_another
from stages.train.processes import TrainingProcess, met, place_in, variables_of_slurm
from stages.wording import counted

RESTARTS = 3
"""How often all processes are started again after one has died."""
SCRATCH = "pipeline-train-"
"""What the temporary folder's name begins with."""
_LOG = logging.getLogger(__name__)


@contextmanager
def started_process() -> Iterator[TrainingProcess | None]:
    """This process as one of several that train together; None if it was started by itself.

    All but the first print nothing; of an error in the block one process prints its line.
    """
    os.environ.update(variables_of_slurm(os.environ))
    place = place_in(os.environ)
    if place is None:
        yield None
        return
    if place.rank:
        silence()
        leave_line_to_another()
    with met(place) as process:
        yield process


def require_as_many(resolved: Resolved, size: int) -> None:
    """UserError if other processes are asked for than were started."""
    if resolved.config.train.processes not in (1, size):
        raise UserError(
            f"{counted(size, 'training process was', 'training processes were')} started by torchrun or srun",
            where="train.processes",
            received=resolved.config.train.processes,
            allowed=f"{size}",
            hint="leave out --processes",
        )


@dataclass(frozen=True)
class Exchange:
    """What the command and the processes that it starts leave for each other: files of a folder."""

    folder: Path

    @property
    def stop(self) -> Path:
        """There once the command wants them to stop."""
        return self.folder / "stop"

    @property
    def training(self) -> Path:
        """There once they train, and stop by themselves when they are to."""
        return self.folder / "training"

    def give(self, settings: dict[str, Any]) -> None:
        """Leave what to do."""
        self.folder.mkdir()
        atomic_write_text(self.folder / "settings.json", json.dumps(settings))

    def settings(self) -> dict[str, Any]:
        """What to do."""
        content: dict[str, Any] = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        return content

    def end(self, ending: dict[str, Any]) -> None:
        """Leave what has come out."""
        atomic_write_text(self.folder / "ending.json", json.dumps(ending))

    def ending(self) -> dict[str, Any]:
        """What has come out; nothing where a process was killed."""
        path = self.folder / "ending.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content


def run_together(config: PipelineConfig, path: Path, *, resume: bool, request: StopRequest, again: str) -> Outcome:
    """Have the run begun, or gone on with, by `train.processes` processes of this machine, and wait for them.

    When one dies, all go on from the newest checkpoint, three times at most.

    Args:
        config: the recipe.
        path: the run's folder.
        resume: it has begun.
        request: takes the wish to stop.
        again: how a person goes on after that.

    Raises:
        UserError: something of the data or the run is wrong, or the processes cannot run.
        KeyboardInterrupt: asked to stop before they train.
    """
    find_training_data(config)  # what is wrong with it is refused before any process starts
    count = config.train.processes
    say(f"starting {counted(count, 'training process', 'training processes')}")
    if usable_cores() < count:
        say(f"warning: there are fewer cores than training processes ({usable_cores()})")
    os.environ.update(own_code.environment())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a connection whose other end has died torch logs traces

    def how_far() -> str:
        return f"; {again}" if (path / CONFIG).is_file() else " before a first step; go on by the same command"

    with (
        TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as scratch,
        request.listening(),
        interruption_note(how_far),
        _ended_with_the_command(),
    ):
        for restart in range(RESTARTS + 1):
            exchange = Exchange(Path(scratch) / str(restart))
            begun = resume or (restart > 0 and (path / CONFIG).is_file())
            exchange.give(_settings(config, begun, again))
            cause = _run_once(exchange, count, request)
            if cause is None:
                return Outcome.from_json(exchange.ending()["outcome"])
            step = _newest_step(path)
            if restart == RESTARTS:
                break
            PEOPLE.show_cursor()  # which the dead process's progress bar has hidden
            say(f"a training process died; all go on after step {step}: {cause}")
    raise UserError(
        f"the training processes died {RESTARTS + 1} times; the last time after step {step}: {cause}",
        hint=f"{again if (path / CONFIG).is_file() else 'go on by the same command'} once that is mended",
        exit_code=1,
    )


def _settings(config: PipelineConfig, resume: bool, again: str) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "resume": resume,
        "again": again,
        "verbose": _LOG.isEnabledFor(logging.INFO),
        "code": own_code.digest(),
    }


def _run_once(exchange: Exchange, count: int, request: StopRequest) -> str | None:
    """Start the processes and wait for their end; why one of them died, None if they have done what they were to."""
    # It takes a second to import.
    from stages.train.launch import run_processes

    def look() -> None:
        if request() and not exchange.stop.exists():
            exchange.stop.touch()
            if not exchange.training.exists():
                request.insist()

    words = ("-m", "pipeline.runs.launched", str(exchange.folder))
    death = run_processes(words, count, exchange.folder / "logs", look)
    if death is None:
        return None
    ending = exchange.ending()
    if "refusal" in ending:
        raise UserError(ending["refusal"], exit_code=ending["exit_code"])
    if request():
        request.insist()
    _LOG.info("%s", ending.get("trace", "the process left no trace"))
    return str(death) if death.was_killed else ending.get("crash", str(death))


@contextmanager
def _ended_with_the_command() -> Iterator[None]:
    """Leave no process behind where the command is interrupted in the block."""
    try:
        yield
    except KeyboardInterrupt:
        end_descendants()
        raise


def _newest_step(path: Path) -> int:
    checkpoints = Checkpoints(path)
    last = checkpoints.last()
    return 0 if last is None else checkpoints.position(last).step
