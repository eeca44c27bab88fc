"""Ray around the plain extraction worker: one actor per GPU (or per node without), ids handed out, small rows back.

Nothing big crosses Ray's object store: actors read the videos and write the cache themselves. Shared storage is
assumed when the cluster has several nodes.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stages import own_code
from stages.cluster.connect import SHOWN_CHARS, last_line
from stages.cluster.shares import WorkerPlace, places_on
from stages.errors import UserError
from stages.extract.worker import (
    MOST_VIDEOS,
    ExtractionJob,
    ExtractionWorker,
    VideoOutcome,
    VideoTask,
    has_room,
    internal_error,
    num_decode_children,
)
from stages.wording import counted

_LOG = logging.getLogger(__name__)

# How long an actor may wait for a place that the cluster's nodes, as they are now, cannot give.
PLACE_LIMIT_S = 60.0

# How often every worker may die without any video done in between: then it is not the videos.
_ROUNDS_OF_DEATHS = 12
_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 20.0

_HEARTBEAT_S = 1.0
_LAST_ANSWER_S = 10.0


OnEncodedVideos = Callable[[dict[str, int]], None]


class WorkerActor:
    """`ExtractionWorker` as a Ray actor; its threads let decoding, networks and writing overlap."""

    def __init__(self, job: ExtractionJob, cores: int, code: str) -> None:
        own_code.require_same(code)
        # Ray gives an actor with one CPU one OpenMP thread, which would leave the other cores idle without a GPU.
        torch.set_num_threads(cores)
        self.worker = ExtractionWorker(job, cores=cores)

    def frames_per_pass(self) -> int:
        """Answered once the networks are loaded."""
        return self.worker.networks.batch_frames

    def process(self, task: VideoTask) -> VideoOutcome:
        return self.worker.process(task)

    def encoded(self) -> dict[str, int]:
        return self.worker.encoded()


def process_all(
    tasks: Sequence[VideoTask],
    job: ExtractionJob,
    *,
    place_limit_s: float = PLACE_LIMIT_S,
    on_encoded: OnEncodedVideos = lambda _frames: None,
) -> Iterator[tuple[VideoOutcome, int]]:
    """Extract every task inside `cluster()` and yield each outcome, with its number of attempts, as it comes.

    Each actor is given a few videos ahead of what it works on, never the whole list. When an actor dies, the videos
    it held are tried one by one in an actor of their own, so that only the one that kills it is charged with that: at
    `max_attempts` it has failed. A fault of the video itself is not retried.

    Args:
        tasks: what to extract.
        job: networks, settings and cache.
        place_limit_s: how long to wait for a node in place of one that is lost, before going on without.
        on_encoded: called about once a second with the frames of each video in work that have been through the
            networks.

    Raises:
        UserError: no worker can be placed or started; every video without an outcome is untouched.
    """
    flow = _Flow(tasks, job, place_limit_s, on_encoded)
    try:
        yield from flow.run()
    finally:
        flow.stop()


class _Try(NamedTuple):
    """A video that waits or is worked on; `attempt` counts from 1."""

    task: VideoTask
    attempt: int


@dataclass(eq=False)
class _Worker:
    """One place and the actor that is there now.

    `frames_per_pass` is known once the actor is ready. `held` are the videos given to it by the reference of their
    outcome; `exclusive`: they are one video that was in a dead actor before. `encoded` are the frames of each
    that have been through its networks, as it answered last; `asked` is the reference of its next answer.
    """

    place: WorkerPlace
    actor: Any
    readiness: Any
    started_s: float
    frames_per_pass: int | None = None
    exclusive: bool = False
    held: dict[Any, _Try] = field(default_factory=dict)
    encoded: dict[str, int] = field(default_factory=dict)
    asked: Any = None

    @property
    def is_ready(self) -> bool:
        return self.frames_per_pass is not None

    @property
    def frames(self) -> list[int]:
        return [len(one.task.times_s) for one in self.held.values()]


class _Flow:
    """The hand-out loop: which actor holds which videos."""

    def __init__(
        self, tasks: Sequence[VideoTask], job: ExtractionJob, place_limit_s: float, on_encoded: OnEncodedVideos
    ) -> None:
        self.job, self.place_limit_s, self.on_encoded = job, place_limit_s, on_encoded
        self.asked_s = time.monotonic()
        self.code = own_code.digest()
        self.waiting = deque(_Try(task, 1) for task in tasks)
        self.retries: deque[_Try] = deque()
        self.deaths_in_a_row = 0
        self.workers = [self._start_actor(place) for place in places_on(ray.nodes(), len(tasks), job.extract)]

    def run(self) -> Iterator[tuple[VideoOutcome, int]]:
        """Hand out and collect until nothing is left."""
        while self.waiting or self.retries or any(worker.held for worker in self.workers):
            for worker in self.workers:
                self._hand_out(worker)
            self._ask_progress()
            owners = {reference: worker for worker in self.workers for reference in self._references(worker)}
            answered, _ = ray.wait(list(owners), num_returns=1, timeout=_HEARTBEAT_S)
            for reference in answered:
                yield from self._collect(reference, owners[reference])
            self._give_up_places()

    def stop(self) -> None:
        """End every actor."""
        for worker in self.workers:
            ray.kill(worker.actor)

    def _start_actor(self, place: WorkerPlace) -> _Worker:
        actor = (
            ray.remote(WorkerActor)
            .options(
                num_cpus=1,
                num_gpus=place.num_gpus,
                max_concurrency=MOST_VIDEOS + 1,  # one thread is left to answer how far the others are
                # Soft: when the node is lost, any other with room will do.
                scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=True),
            )
            .remote(self.job, place.cores, self.code)
        )
        return _Worker(place, actor, actor.frames_per_pass.remote(), time.monotonic())

    @staticmethod
    def _references(worker: _Worker) -> list[Any]:
        if not worker.is_ready:
            return [worker.readiness]
        return list(worker.held) if worker.asked is None else [*worker.held, worker.asked]

    def _ask_progress(self) -> None:
        """Ask every actor that works how far it is, now and then."""
        if time.monotonic() - self.asked_s < _HEARTBEAT_S:
            return
        self.asked_s = time.monotonic()
        for worker in self.workers:
            if worker.held and worker.asked is None:
                worker.asked = worker.actor.encoded.remote()

    def _hand_out(self, worker: _Worker) -> None:
        """Give videos to an actor that runs: one that was in a dead actor, or as many others as keep it busy."""
        if worker.frames_per_pass is None:
            return
        if not worker.held:
            worker.exclusive = bool(self.retries)
            if self.retries:
                self._give(worker, self.retries.popleft())
        children = num_decode_children(self.job.extract, worker.place.cores)
        while self.waiting and not worker.exclusive and has_room(worker.frames, worker.frames_per_pass, children):
            self._give(worker, self.waiting.popleft())

    @staticmethod
    def _give(worker: _Worker, one: _Try) -> None:
        worker.held[worker.actor.process.remote(one.task)] = one

    def _collect(self, reference: Any, worker: _Worker) -> Iterator[tuple[VideoOutcome, int]]:
        if reference == worker.asked:
            self._note_progress(worker)
            return
        if reference != worker.readiness and reference not in worker.held:
            return  # its actor's death was dealt with a moment ago
        try:
            answer = _answer(reference)
        except RayError as error:
            # The actor died, was ended by Ray's memory monitor, or its node is gone.
            yield from self._replace(worker, error)
            return
        if reference == worker.readiness:
            worker.frames_per_pass = answer
        else:
            yield self._outcome(worker.held.pop(reference), answer)

    def _note_progress(self, worker: _Worker) -> None:
        try:
            worker.encoded = _answer(worker.asked)
        except RayError:
            worker.encoded = {}  # the videos that it held will show that it died
        worker.asked = None
        held = {one.task.video for worker in self.workers for one in worker.held.values()}
        known = {video: frames for worker in self.workers for video, frames in worker.encoded.items()}
        self.on_encoded({video: frames for video, frames in known.items() if video in held})

    def _outcome(self, one: _Try, answer: VideoOutcome | Exception) -> tuple[VideoOutcome, int]:
        if isinstance(answer, Exception):
            return internal_error(one.task.video, answer), one.attempt
        if answer.checksum is not None:
            self.deaths_in_a_row = 0
        return answer, one.attempt

    def _replace(self, worker: _Worker, error: RayError) -> Iterator[tuple[VideoOutcome, int]]:
        """Start another actor; what the dead one held and had not finished is tried again, video by video."""
        if getattr(error, "actor_init_failed", False):
            raise UserError(f"the extraction worker could not start: {last_line(error)}", exit_code=1)
        ray.kill(worker.actor)  # it may live, out of reach; two must not work on one video
        victims = []
        for reference, one in worker.held.items():
            try:
                yield self._outcome(one, _answer(reference))
            except RayError:
                victims.append(one)
        self._count_death(error)
        self.workers[self.workers.index(worker)] = self._start_actor(worker.place)
        if len(victims) != 1:
            self.retries.extend(_again(one, one.attempt) for one in victims)
        elif victims[0].attempt < self.job.extract.max_attempts:
            self.retries.appendleft(_again(victims[0], victims[0].attempt + 1))
        else:
            (one,) = victims
            yield (
                VideoOutcome(
                    one.task.video, reason=f"its worker died {counted(one.attempt, 'time')} with this video only"
                ),
                one.attempt,
            )

    def _count_death(self, error: RayError) -> None:
        _LOG.warning("an extraction worker %s; starting another", _way_of_dying(error))
        self.deaths_in_a_row += 1
        rounds, rest = divmod(self.deaths_in_a_row, len(self.workers))  # a lost node takes all of its workers at once
        if rest:
            return
        if rounds >= _ROUNDS_OF_DEATHS:
            raise UserError(
                f"{self.deaths_in_a_row} extraction workers died one after the other without a video done; the last "
                f"{_way_of_dying(error)}",
                hint="what is committed stays; see Ray's log on that node, then run the same command again",
                exit_code=1,
            )
        # The first are replaced at once. When they go on dying, what kills them (a full memory) may need time to pass.
        time.sleep(min(_PAUSE_S * (rounds - 1), _LONGEST_PAUSE_S))

    def _give_up_places(self) -> None:
        """Go on without the actors for which the cluster has no node any more."""
        late = time.monotonic() - self.place_limit_s
        for worker in [worker for worker in self.workers if not worker.is_ready and worker.started_s < late]:
            have = ray.cluster_resources()
            gpus = sum(other.place.num_gpus for other in self.workers)
            if gpus <= have.get("GPU", 0) and len(self.workers) <= have.get("CPU", 0):
                continue  # it loads its networks, or waits for other users of the cluster
            ray.kill(worker.actor)
            self.workers.remove(worker)
            _LOG.warning("a node is lost; going on with %s", counted(len(self.workers), "worker"))
        if not self.workers:
            raise UserError(
                f"the cluster has no node left that can run a worker, after {self.place_limit_s:g} s of waiting",
                received=f"{counted(have.get('GPU', 0), 'GPU')}, {counted(have.get('CPU', 0), 'CPU core')}",
                hint="what is committed stays; bring a node back and run the same command again to go on",
                exit_code=1,
            )


def _answer(reference: Any) -> Any:
    """What an actor answered, or the exception that its code raised.

    Raises:
        RayError: it has not answered and will not.
    """
    try:
        return ray.get(reference, timeout=_LAST_ANSWER_S)
    except RayTaskError as error:
        return error.cause


def _again(one: _Try, attempt: int) -> _Try:
    return _Try(replace(one.task, again=True), attempt)


def _way_of_dying(error: RayError) -> str:
    if isinstance(error, OutOfMemoryError):
        return "was ended by Ray because the memory of its node was nearly full"
    return f"died ({last_line(error)[:SHOWN_CHARS]})"
