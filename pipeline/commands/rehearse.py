"""`pipeline rehearse`: every stage at the true sizes with random weights, before anything is downloaded."""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.commands.rehearse_stage import CONFIG, STAGES, Cost
from pipeline.runs.rehearsal import dress, needed, smaller
from pipeline.screen.console import beside_json, emit_json, print_answer, progress_bar, table
from pipeline.settings.config import PipelineConfig, Resolved, dump_yaml
from stages import own_code
from stages.errors import UserError
from stages.records import read_json
from stages.signals import interruption_note
from stages.wording import GIB

_PREFIX = "diff-lmm-rehearsal-"
_LOG_TAIL = 2000


def run(resolved: Resolved, *, language_layers: int | None, as_json: bool) -> None:
    """Run the stages one after the other, each in a process of its own, and print what each took.

    Args:
        resolved: what is rehearsed; the data set decides the frames of a clip and the question.
        language_layers: layers that are kept of the language model; None: all.
        as_json: print one object on stdout, too.

    Raises:
        UserError: a stage did not fit into the memory (exit code 1), or cannot run at all.
    """
    costs: dict[str, Cost] = {}
    with (
        interruption_note(lambda: "; nothing of it is kept"),
        tempfile.TemporaryDirectory(prefix=_PREFIX) as name,
        progress_bar("rehearse", len(STAGES), "stage") as bar,
    ):
        folder = Path(name)
        config = dress(resolved.config, folder, language_layers=language_layers)
        (folder / CONFIG).write_text(dump_yaml(config), encoding="utf-8")
        for stage in STAGES:
            bar.move_to(bar.done, stage)
            costs[stage] = _run(stage, folder)
            if not costs[stage].passed:
                break
            bar.advance(note="")
        failure = failure_of(stage, costs[stage], config)
    _show(resolved, config, costs, language_layers=language_layers, as_json=as_json)
    if failure is not None:
        raise failure


def _run(stage: str, folder: Path) -> Cost:
    """One stage in its process; its end is ours, and what it prints goes into a file."""
    # What is remembered of networks that are gone with the folder is no use to anybody.
    environment = {**os.environ, **own_code.environment(), "XDG_CACHE_HOME": str(folder / "user-cache")}
    command = [sys.executable, "-P", "-m", "pipeline.commands.rehearse_stage", stage, str(folder), str(os.getpid())]
    log = folder / f"{stage}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own program
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
    if code == 0:
        content = read_json(folder / f"{stage}.json")
        assert isinstance(content, dict)
        return Cost(**content)
    printed = log.read_text(errors="replace")[-_LOG_TAIL:]
    # By the system, which had no memory left; or by a library that cannot go on without.
    if code == -signal.SIGKILL or (code == -signal.SIGABRT and "bad_alloc" in printed):
        return Cost(fits=False)
    raise RuntimeError(f"stage {stage} ended with {code}: {printed}")


def failure_of(stage: str, cost: Cost, config: PipelineConfig) -> UserError | None:
    """What is wrong with the last stage, if anything is."""
    if cost.error is not None:
        return UserError(cost.error, where=f"stage {stage}")
    if cost.fits:
        return None
    held = cost.peak_bytes if cost.gpu_bytes is None else cost.gpu_bytes
    had = f": it held {_gib(held)} of {_gib(cost.free_bytes)} that were free" if held else ""
    if stage == "extract":
        hint = "try --set extract.batch_size=1 --set extract.precision=bfloat16, or a machine with more memory"
        return UserError(f"does not fit into the memory{had}", where=f"stage {stage}", hint=hint, exit_code=1)
    need = needed(config, stage)
    settings, less = smaller(config, cost.free_bytes)
    given = " ".join(f"--set {key}={value}" for key, value in settings.items())
    hint = f"with {given} a training step needs about {_gib(less)}; --preset small needs less still"
    what = f"does not fit into the memory{had}, and by arithmetic it needs about {_gib(need)}"
    return UserError(what, where=f"stage {stage}", hint=hint, exit_code=1)


def _show(
    resolved: Resolved, config: PipelineConfig, costs: dict[str, Cost], *, language_layers: int | None, as_json: bool
) -> None:
    done = {stage: cost for stage, cost in costs.items() if cost.passed}
    passed = len(done) == len(STAGES)
    content: dict[str, Any] = {
        "preset": resolved.config.preset,
        "precision": {"extract": config.extract.precision, "train": config.train.precision},
        "language_layers": language_layers,
        "stages": {stage: asdict(cost) for stage, cost in costs.items()},
        "passed": passed,
    }
    if as_json:
        emit_json(content)
    on_gpu = any(cost.gpu_bytes is not None for cost in done.values())
    rows = [
        (
            stage,
            cost.work,
            f"{cost.loading_s:,.1f}",
            f"{cost.seconds:,.1f}",
            f"{cost.cpu_s:,.0f}",
            _gib(cost.peak_bytes),
            *((_gib(cost.gpu_bytes or 0),) if on_gpu else ()),
        )
        for stage, cost in done.items()
    ]
    of_gpu = ("peak of the GPU",) if on_gpu else ()
    columns = ("stage", "work", "loading s", "seconds", "CPU s", "peak memory", *of_gpu)
    with beside_json(as_json):
        if rows:
            cut = "" if language_layers is None else f", {language_layers} layers of the language model"
            table(f"rehearsal of preset {resolved.config.preset}, random weights{cut}", columns, rows)
        if passed:
            print_answer("every stage fits" if language_layers is None else "every stage fits, so cut")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB"
