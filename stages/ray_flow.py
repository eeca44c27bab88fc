"""Ray around the plain extraction worker: one actor per GPU (or per node without), ids handed out, small rows back.

Nothing big crosses Ray's object store: actors read the videos and write the cache themselves. Shared storage is
assumed when the cluster has several nodes.
"""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from stages.errors import UserError
from stages.worker import ExtractionJob, ExtractionWorker, VideoOutcome, VideoTask, num_decode_children

_LOG = logging.getLogger(__name__)


class WorkerActor:
    """`ExtractionWorker` as a Ray actor; its threads let decoding and networks overlap."""

    def __init__(self, job: ExtractionJob) -> None:
        # Ray gives an actor with one CPU one OpenMP thread, which would leave the other cores idle without a GPU.
        torch.set_num_threads(os.cpu_count() or 1)
        self.worker = ExtractionWorker(job)

    def process(self, task: VideoTask) -> VideoOutcome:
        """See `ExtractionWorker.process`."""
        return self.worker.process(task)


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine for the time of the block.

    Raises:
        UserError: the cluster does not answer.
    """
    # Ray would run its workers at low priority (nice 15); an actor that feeds a GPU must not starve beside other work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"no Ray cluster: {error}", where="--address", received=address, hint="start one with `ray start --head`"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def process_all(tasks: Sequence[VideoTask], job: ExtractionJob) -> Iterator[tuple[VideoOutcome, int]]:
    """Extract every task inside `cluster()` and yield each outcome, with its number of attempts, as it comes.

    Each actor is given a few videos ahead of what it works on, never the whole list. A video whose actor died is given
    to another one, at most `max_attempts` times; a fault of the video itself is not retried.
    """
    flow = _Flow(tasks, job)
    try:
        yield from flow.run()
    finally:
        flow.stop()


class _Held(NamedTuple):
    """A video that an actor works on: which attempt, and which of the actors."""

    task: VideoTask
    attempt: int
    place: int
    actor: Any


class _Flow:
    """The hand-out loop: which actor holds which videos."""

    def __init__(self, tasks: Sequence[VideoTask], job: ExtractionJob) -> None:
        self.job = job
        self.waiting = deque((task, 1) for task in tasks)
        # One more than the decode children, so that a child never waits for the driver.
        self.ahead = num_decode_children(job.extract) + 1
        self.places = _places(len(tasks))
        self.actors = [self._start_actor(num_gpus) for num_gpus in self.places]
        self.held: dict[Any, _Held] = {}

    def run(self) -> Iterator[tuple[VideoOutcome, int]]:
        """Hand out and collect until nothing is left."""
        while self.waiting or self.held:
            self._hand_out()
            ready, _ = ray.wait(list(self.held), num_returns=1)
            for reference in ready:
                held = self.held.pop(reference)
                outcome = self._collect(reference, held)
                if outcome is not None:
                    yield outcome, held.attempt

    def stop(self) -> None:
        """End every actor."""
        for actor in self.actors:
            ray.kill(actor)

    def _start_actor(self, num_gpus: int) -> Any:
        actor_class = ray.remote(WorkerActor).options(
            num_cpus=1, num_gpus=num_gpus, max_concurrency=self.ahead, scheduling_strategy="SPREAD"
        )
        return actor_class.remote(self.job)

    def _hand_out(self) -> None:
        load = [0] * len(self.actors)
        for held in self.held.values():
            load[held.place] += 1
        while self.waiting and min(load) < self.ahead:
            place = load.index(min(load))
            task, attempt = self.waiting.popleft()
            actor = self.actors[place]
            self.held[actor.process.remote(task)] = _Held(task, attempt, place, actor)
            load[place] += 1

    def _collect(self, reference: Any, held: "_Held") -> VideoOutcome | None:
        try:
            outcome: VideoOutcome = ray.get(reference)
        except RayTaskError as error:
            # A defect of ours in the worker: the video is named, the trace is kept, the others go on.
            _LOG.exception("worker raised on video %s", held.task.video)
            return VideoOutcome(held.task.video, reason=f"internal error: {error.cause!r}")
        except RayError as error:
            # The actor died, was ended by Ray's memory monitor, or its node is gone.
            return self._after_death(error, held)
        return outcome

    def _after_death(self, error: RayError, held: "_Held") -> VideoOutcome | None:
        if getattr(error, "actor_init_failed", False):
            raise UserError(f"the extraction worker could not start: {_last_line(error)}", exit_code=1)
        # The first of a dead actor's videos to be collected replaces it; the others find it replaced.
        if self.actors[held.place] is held.actor:
            self.actors[held.place] = self._start_actor(self.places[held.place])
        if held.attempt >= self.job.extract.max_attempts:
            return VideoOutcome(held.task.video, reason=f"worker died {held.attempt} times while it held this video")
        self.waiting.append((held.task, held.attempt + 1))
        return None


def _places(num_tasks: int) -> list[int]:
    """GPUs of each actor to start: an actor for each GPU of the cluster, or for each node without any."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        return [1] * min(gpus, num_tasks)
    nodes = sum(node["Alive"] for node in ray.nodes())
    return [0] * max(1, min(nodes, num_tasks))


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    user_error = f"{UserError.__module__}.{UserError.__qualname__}: "
    return lines[-1].strip().removeprefix(user_error) if lines else type(error).__name__
