"""Trainings as Ray Tune trials: many at once, each with its share of the cores and GPUs, none hurt by another's end.

Ray Tune hands out the trials and keeps the worker processes from one to the next, so that Python and the networks'
libraries start once per place. What a trial keeps is its run folder, not Tune's own state: that is thrown away.
"""

import logging
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayActorError

from stages import own_code
from stages.cluster.connect import last_line
from stages.cluster.shares import Share

Work = Callable[[str], str | None]
"""Does one trial's order and returns why it failed; None if it did not."""

# What Tune would do beside running the trials: write logs of its own, catch Ctrl-C, move to another directory.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_ORDER, _REASON = "order", "reason"
_SCRATCH = ".tune-"


@dataclass(frozen=True)
class Order:
    """One trial: an id, and the text that tells the worker what to do."""

    id: str
    text: str


def run_trials(
    orders: Sequence[Order],
    work: Work,
    share: Share,
    *,
    scratch: Path,
    on_start: Callable[[str], None],
    on_end: Callable[[str, str | None, float], None],
) -> None:
    """Run every order, inside `stages.cluster.connect.cluster`.

    Args:
        orders: what to do.
        work: what does it, in a worker process.
        share: how many at once, with what.
        scratch: folder that all nodes see and no other call uses; Tune's own files are there for the time of the call.
        on_start: told the id of each trial that starts.
        on_end: told of each that ended its id, why it failed (None: it did not), and its seconds.
    """
    os.environ.update(_QUIET)
    # Tune imports pandas and pyarrow, which nothing else here needs.
    from ray import tune

    # It would print the trace of every process that dies; `on_end` is told.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    scratch.mkdir(parents=True, exist_ok=True)
    for killed in scratch.glob(f"{_SCRATCH}*"):
        shutil.rmtree(killed, ignore_errors=True)
    # Ray tells of processes that die on stdout, which belongs to machines.
    with tempfile.TemporaryDirectory(dir=scratch, prefix=_SCRATCH) as storage, redirect_stdout(sys.stderr):
        tuner = tune.Tuner(
            tune.with_resources(_trainable(work, share), {"cpu": share.cpus, "gpu": share.gpus}),
            param_space={_ORDER: tune.grid_search([{"id": one.id, "text": one.text} for one in orders])},
            tune_config=tune.TuneConfig(max_concurrent_trials=share.parallel, reuse_actors=True),
            run_config=tune.RunConfig(
                name="study",
                storage_path=str(Path(storage).resolve()),
                verbose=0,
                callbacks=[_teller(on_start, on_end)],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()


def _trainable(work: Work, share: Share) -> Any:
    from ray import tune

    code = own_code.digest()

    class Worker(tune.Trainable):
        """One place that does one order after the other."""

        def setup(self, config: dict[str, Any]) -> None:
            own_code.require_same(code)
            torch.set_num_threads(max(1, int(share.cpus)))
            self.order = config[_ORDER]

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.order = new_config[_ORDER]
            return True

        def step(self) -> dict[str, Any]:
            return {"done": True, _REASON: work(self.order["text"])}

    return Worker


def _why(trial: Any) -> str:
    # Tune's own way to it looks where the file is only copied to later.
    file = trial.pickled_error_file
    error = pickle.loads(Path(file).read_bytes()) if file is not None else None  # noqa: S301 - Tune's own file
    if error is None or (isinstance(error, RayActorError) and not getattr(error, "actor_init_failed", False)):
        return "its process died: it was killed, or ran out of memory"
    return f"its process could not do it: {last_line(error)}"


def _teller(on_start: Callable[[str], None], on_end: Callable[[str, str | None, float], None]) -> Any:
    from ray import tune

    class Teller(tune.Callback):
        """Passes on what Tune says of its trials."""

        def __init__(self, on_start: Callable[[str], None], on_end: Callable[[str, str | None, float], None]) -> None:
            self.on_start, self.on_end = on_start, on_end
            self.started_s: dict[str, float] = {}

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune saves its callbacks, to resume studies by; these are resumed by their runs

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
            name = trial.config[_ORDER]["id"]
            self.started_s[name] = time.monotonic()
            self.on_start(name)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
            self._end(trial, trial.last_result.get(_REASON))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ARG002
            self._end(trial, _why(trial))

        def _end(self, trial: Any, reason: str | None) -> None:
            name = trial.config[_ORDER]["id"]
            self.on_end(name, reason, time.monotonic() - self.started_s.get(name, time.monotonic()))

    return Teller(on_start, on_end)
