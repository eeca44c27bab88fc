"""What one trial does in its worker process: train its run to the end, or go on with it, then evaluate it."""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from pipeline.commands import evaluate, train
from pipeline.runs.run_folder import CONFIG
from pipeline.settings.config import PipelineConfig, Resolved
from pipeline.studies.members import SPLIT, Training, is_trained
from stages.errors import UserError
from stages.studies.study import Member


def order_of(one: Training, log: Path) -> str:
    """The text that tells a worker of a training, and where its output goes."""
    content = {
        "member": one.member.model_dump(mode="json"),
        "seed": one.seed,
        "config": one.config.model_dump(mode="json"),
        "digest": one.digest,
        "log": str(log),
        "folder": str(Path.cwd()),
    }
    return json.dumps(content)


def work(order: str) -> str | None:
    """Do an order; returns why it failed, None if it did not."""
    content = json.loads(order)
    one = Training(
        Member.model_validate(content["member"]),
        content["seed"],
        PipelineConfig.model_validate(content["config"]),
        content["digest"],
    )
    os.chdir(content["folder"])  # relative folders are those of the command
    with _output_into(Path(content["log"])):
        try:
            _train_and_evaluate(one)
        except UserError as error:
            return _told(str(error))
        except SystemExit:
            return _told("it was asked to stop; its newest checkpoint stays")
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


def _told(reason: str) -> str:
    sys.stderr.write(f"error: {reason}\n")
    return reason


@contextmanager
def _output_into(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        yield
