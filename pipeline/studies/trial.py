"""What one trial does in its process: train its run to the end, or go on with it, then evaluate it."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from pipeline.commands import evaluate, train
from pipeline.runs.run_folder import CONFIG
from pipeline.settings.config import Resolved
from pipeline.studies.members import SPLIT, Training, is_trained
from stages.errors import UserError


@dataclass(frozen=True)
class Trial:
    """One training of a study.

    Attributes:
        training: which.
        log: file that its output goes to.
        folder: working directory of the command, which relative folders are meant from.
    """

    training: Training
    log: Path
    folder: Path


def run_trial(trial: Trial) -> str | None:
    """Train and evaluate; returns why that failed, None if it did not."""
    os.chdir(trial.folder)
    with _output_into(trial.log):
        try:
            _train_and_evaluate(trial.training)
        except UserError as error:
            return _logged(str(error))
        except SystemExit:
            return _logged("it was asked to stop; its newest checkpoint stays")
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other members
            traceback.print_exc()
            return f"internal error: {' '.join(f'{type(error).__name__}: {error}'.split())}"
    return None


def _train_and_evaluate(one: Training) -> None:
    if not is_trained(one):
        begun = (one.path / CONFIG).is_file()
        train.run(Resolved(one.config, {}), resume=begun, as_json=False)
    # A cache may have moved since the run began.
    options = {"cache.root": one.config.cache.root}
    evaluate.run(one.path, split=SPLIT, overrides=[], as_json=False, options=options)


def _logged(reason: str) -> str:
    sys.stderr.write(f"error: {reason}\n")
    return reason


@contextmanager
def _output_into(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        yield
