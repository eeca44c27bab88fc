"""`pipeline demo`: generate the synthetic videos, then the same commands as for any data set, one after the other."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.commands import evaluate, extract, report, synthesize, train
from pipeline.runs.run_folder import CONFIG
from pipeline.screen.browser import show
from pipeline.screen.console import beside_json, emit_json, print_answer
from pipeline.settings.config import Resolved, resolve
from stages.errors import UserError
from stages.evaluate.scoring import TaskScore
from stages.wording import counted

_SEED = 0


def run(folder: Path, overrides: list[str], *, open_report: bool, as_json: bool) -> None:
    """Run every stage, say what each took, end with the table of accuracies and the report in the browser."""
    seconds: dict[str, float] = {}
    resolved = _resolve(folder, overrides)
    with beside_json(as_json):
        with _timed(seconds, "generate"):
            synthesize.run(folder / "data", seed=_SEED)
        with _timed(seconds, "extract"):
            if extract.run(resolved, address=None, retry_failed=False, as_json=False):
                raise UserError("a synthetic video failed extraction", where=folder, exit_code=3)
        with _timed(seconds, "train"):
            # An earlier, interrupted demo in the same folder is gone on with.
            resume = (folder / "run" / CONFIG).is_file()
            path = train.run(resolved, resume=resume, as_json=False, again="go on by the same command")
        with _timed(seconds, "evaluate"):
            scores = evaluate.run(path, split="test", overrides=[], as_json=False)
        with _timed(seconds, "report"):
            page = report.run([path], None)
            assert page is not None  # a run was given
        beaten = _finish(path, page, scores, seconds)
    if as_json:
        emit_json({"run": str(path), "report": str(page), "seconds": seconds, "beaten": beaten})
    if open_report:
        show(page)


def _resolve(folder: Path, overrides: list[str]) -> Resolved:
    options = {
        "data.dataset": "synthetic",
        "data.videos": str(folder / "data" / "videos"),
        "data.annotations": str(folder / "data" / "annotations"),
        "cache.root": str(folder / "cache"),
        "run.folder": str(folder),
        "run.name": "run",
    }
    return resolve(preset="tiny", options=options, overrides=overrides)


def _finish(path: Path, page: Path, scores: dict[str, TaskScore], seconds: dict[str, float]) -> list[str]:
    """Print what came out; returns the tasks that beat their floor."""
    beaten = [task for task, one in scores.items() if one.beats_floor]
    spent = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    print_answer(f"{sum(seconds.values()):.0f} s in all: {spent}")
    tasks = counted(len(scores), "task")
    named = f": {', '.join(beaten)}" if beaten else ""
    print_answer(f"{len(beaten)} of {tasks} beat their floor beyond the 95% intervals{named}")
    print_answer(f"run:    {path}")
    print_answer(f"report: {page}")
    return beaten


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
