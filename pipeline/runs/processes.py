"""`pipeline train --processes N`: several processes train one run. What the command does, and what each of them."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pipeline.runs.run_folder import CONFIG
from pipeline.runs.training import Outcome
from pipeline.screen.console import Bar, progress_bar, say
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.cluster.connect import cluster
from stages.cluster.shares import seats_on
from stages.errors import UserError
from stages.signals import Stopped, StopRequest, telling
from stages.train.processes import Line, Member, Row, Start, train_together
from stages.wording import counted

_CLIENT = "ray://"


def run_together(
    config: PipelineConfig,
    path: Path,
    *,
    address: str | None,
    request: StopRequest,
    again: str,
    show: Callable[[Bar, Row], None],
) -> Outcome:
    """Have the run begun or gone on with by `train.processes` processes, and wait for them.

    Args:
        config: the recipe.
        path: the run's folder, which is this command's alone.
        address: Ray cluster; None: one on this machine.
        request: takes the wish to stop.
        again: how a person goes on after that.
        show: moves the progress bar one step on.

    Raises:
        UserError: something of the data or the run is wrong, or the processes cannot run.
        Stopped: asked to stop before they had begun.
    """
    if address is not None and address.startswith(_CLIENT):
        raise UserError(
            "a training is led from within its cluster",
            where="--address",
            received=address,
            hint="run the command on a node of the cluster, with --address auto",
        )
    import ray

    processes = counted(config.train.processes, "training process", "training processes")
    say(f"starting Ray for {processes}")
    order = json.dumps({"config": config.model_dump(mode="json"), "folder": str(Path.cwd())})
    with ExitStack() as bar, cluster(address), request.listening(), telling(lambda: f"; {again}"):
        seats = seats_on(ray.nodes(), config.train.processes)
        told = _Told(bar, show)
        if seats.cpus < 1:
            say(f"warning: there are fewer cores than training processes; each has {seats.cpus:g} of one")
        answer = train_together(work, order, seats, scratch=path, stop=request, on_said=told)
    if answer is None:
        say("stopped before a first step; go on by the same command")
        raise Stopped(request.exit_code)
    return Outcome.from_json(answer)


class _Told:
    """Shows what the processes say."""

    def __init__(self, stack: ExitStack, show: Callable[[Bar, Row], None]) -> None:
        self._stack, self._show = stack, show
        self._bar: Bar | None = None
        self._done = 0

    def __call__(self, said: Line | Start | Row) -> None:
        if isinstance(said, Line):
            say(said.text)
        elif isinstance(said, Start):
            if self._bar is None:
                self._bar = self._stack.enter_context(progress_bar("train", said.total, "step", done=said.step))
                self._done = said.step
            else:
                say(f"a training process died; all go on after step {said.step} of {said.total}")
        elif said["step"] >= self._done and self._bar is not None:  # not one that is taken for the second time
            self._done += 1
            self._show(self._bar, said)


def work(order: str, member: Member) -> str:
    """One process of a training: begin the run, or go on from its newest checkpoint, until the end."""
    from pipeline.runs.training import begin, prepare

    content = json.loads(order)
    os.chdir(content["folder"])  # relative folders are those of the command
    config = PipelineConfig.model_validate(content["config"])
    path = locations.run_folder(config)
    with member.voice():
        trainer, loaded, stamp = prepare(config, path, member.asked_to_stop, member.group)
        if member.group.rank == 0:
            begin(path, config, loaded, stamp, resume=(path / CONFIG).is_file())
        if trainer.resume(lambda line: say(f"warning: {line}")):
            say(f"resuming {path} after step {trainer.position.step} of {trainer.total_steps}")
        member.start(trainer.position.step, trainer.total_steps)
        ending = trainer.fit(member.row)
    return Outcome(ending, trainer.total_steps, loaded.trained_count).to_json()
