"""A training process that `pipeline train --processes` has started: `python -m pipeline.runs.launched FOLDER`.

The first of them shows how far the training is. What it comes to, or why one of them failed, is left in the folder for
the command, which prints it.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.runs.processes import Exchange, started_process
from pipeline.runs.training import train
from pipeline.screen.console import set_up_logging
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages import own_code
from stages.errors import user_error_of
from stages.signals import StopRequest

_SHOWN_CHARS = 300


class _CommandsWish(StopRequest):
    """The command's wish to stop, in the first process; also where the command is gone."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange, self._command = exchange, os.getppid()

    def __call__(self) -> bool:
        return self._exchange.stop.exists() or os.getppid() != self._command

    @contextmanager
    def listening(self) -> Iterator[None]:
        self._exchange.training.touch()
        yield


def main(folder: Path) -> None:
    """Do what the command has left in the folder."""
    # The command blocks them for itself; torch's agent ends this process by them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    exchange = Exchange(folder)
    settings = exchange.settings()
    set_up_logging(verbose=settings["verbose"])
    config = PipelineConfig.model_validate(settings["config"])
    try:
        own_code.require_same(settings["code"])
        with started_process() as process:
            assert process is not None
            group = process.join()
            request = _CommandsWish(exchange) if group.rank == 0 else StopRequest()
            resume, again = settings["resume"], settings["again"]
            outcome = train(config, locations.run_folder(config), request, resume=resume, again=again, group=group)
            if group.rank == 0:
                exchange.end({"outcome": outcome.to_json()})
    except Exception as error:  # noqa: BLE001 - the command prints it
        refusal = user_error_of(error)
        if refusal is not None:
            exchange.end({"refusal": str(refusal), "exit_code": refusal.exit_code})
        else:
            crash = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN_CHARS]
            exchange.end({"crash": crash, "trace": traceback.format_exc()})
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
