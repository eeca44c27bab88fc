"""Trainings by Ray actors: many at once, each with its share of the cores and GPUs, none hurt by another's end.

An actor does one trial after the other, so that Python and the networks' libraries start once per place.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
import torch
from ray.exceptions import RayActorError, RayError

from stages import own_code
from stages.cluster.connect import last_line
from stages.cluster.shares import Share

T = TypeVar("T")


class TrialActor(Generic[T]):
    """One place that does one trial after the other."""

    def __init__(self, run: Callable[[T], str | None], cores: float, code: str) -> None:
        own_code.require_same(code)
        torch.set_num_threads(max(1, int(cores)))
        self._run = run

    def run(self, trial: T) -> str | None:
        return self._run(trial)


@dataclass(frozen=True)
class _Running:
    """A trial that is worked on."""

    name: str
    actor: Any
    began_s: float


def run_trials(
    trials: Mapping[str, T],
    run: Callable[[T], str | None],
    share: Share,
    *,
    on_start: Callable[[str], None],
    on_end: Callable[[str, str | None, float], None],
) -> None:
    """Run every trial, inside `stages.cluster.connect.cluster`.

    Args:
        trials: by name, in the order in which they begin.
        run: does one in an actor and returns why it failed; None if it did not.
        share: how many at once, with what.
        on_start: called with the name of each trial that starts.
        on_end: called with the name of each that ended, why it failed (None: it did not), and its seconds.
    """
    # Ray prints about processes that die on stdout, which belongs to results.
    with redirect_stdout(sys.stderr):
        actor_of = ray.remote(TrialActor).options(num_cpus=share.cpus, num_gpus=share.gpus)
        code, waiting = own_code.digest(), deque(trials)
        idle: list[Any] = []
        running: dict[Any, _Running] = {}
        while waiting or running:
            while waiting and len(running) < share.parallel:
                name, actor = waiting.popleft(), idle.pop() if idle else actor_of.remote(run, share.cpus, code)
                running[actor.run.remote(trials[name])] = _Running(name, actor, time.monotonic())
                on_start(name)
            (reference, *_), _ = ray.wait(list(running), num_returns=1)
            one = running.pop(reference)
            try:
                reason = ray.get(reference)
                idle.append(one.actor)
            except RayError as error:
                reason = _why(error)
                ray.kill(one.actor)
            on_end(one.name, reason, time.monotonic() - one.began_s)


def _why(error: RayError) -> str:
    if isinstance(error, RayActorError) and not getattr(error, "actor_init_failed", False):
        return "its process died: it was killed, or ran out of memory"
    return f"its process could not do it: {last_line(error)}"
