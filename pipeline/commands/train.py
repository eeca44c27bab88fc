"""`pipeline train`: Stage 2."""

import json
from dataclasses import asdict
from pathlib import Path

from pipeline.runs.cached_data import find_training_data
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.training import Outcome, begin, prepare, resumed_config
from pipeline.screen.console import Bar, beside_json, emit_json, print_answer, progress_bar, say, table
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig, Resolved
from stages.atomic import atomic_write_text
from stages.errors import UserError
from stages.networks.quantization import require_quantization
from stages.signals import Stopped, StopRequest, telling
from stages.train.metric_log import require_wandb
from stages.train.profile import TRACE, Breakdown, StepProfile
from stages.train.run_lock import training
from stages.train.trainer import Ending, Trainer
from stages.wording import counted

AGAIN = "go on by the same command and --resume"


def run(
    resolved: Resolved,
    *,
    resume: bool,
    as_json: bool,
    profile: bool = False,
    address: str | None = None,
    again: str = AGAIN,
) -> Path:
    """Train, print the summary, and return the run's folder.

    With `train.processes` above 1, or an address, Ray Train runs the processes. `again` is how a person goes on with a
    training that was stopped.

    Raises:
        Stopped: asked to stop by a signal; what was learned is saved.
        KeyboardInterrupt: asked before a first step, or twice by Ctrl-C.
    """
    config = resolved.config
    path = locations.run_folder(config)
    if resume:
        config = resumed_config(RunFolder.open(path), resolved)
    else:
        RunFolder.require_free(path)
    if "wandb" in config.train.trackers:
        require_wandb()
    if config.train.shard_language != "none" and config.train.processes == 1:
        raise UserError(
            "one process has nobody to share the language model with",
            where="train.shard_language",
            received=config.train.shard_language,
            hint="train with --processes 2 or more, or without it",
        )
    require_quantization(config.language.quantize, sharded=config.train.shard_language != "none")
    request = StopRequest()
    with telling(lambda: " before a first step; go on by the same command"), beside_json(as_json):
        if config.train.processes > 1 or address is not None:
            outcome = _by_several(config, path, request, again, resume=resume, address=address, profile=profile)
        else:
            outcome = _by_one(config, path, request, again, resume=resume, profile=profile)
    with telling(lambda: f"; {again}"):
        _tell(outcome, path, again, as_json=as_json)
        if outcome.ending.stopped:
            raise Stopped(request.exit_code)
        request.insist()
    return path


def _by_one(
    config: PipelineConfig, path: Path, request: StopRequest, again: str, *, resume: bool, profile: bool
) -> Outcome:
    """Train in this process."""
    trainer, loaded, stamp = prepare(config, path, request)
    with training(path):
        begin(path, config, loaded, stamp, resume=resume)
        if resume and trainer.resume(lambda line: say(f"warning: {line}")):
            say(f"resuming {path} after step {trainer.position.step} of {trainer.total_steps}")
        with request.listening(), telling(lambda: f"; {again}"):
            ending = _fit(trainer, config, StepProfile(path / "profile", loaded.compute.device) if profile else None)
    return Outcome(ending, trainer.total_steps, loaded.trained_count)


def _by_several(
    config: PipelineConfig,
    path: Path,
    request: StopRequest,
    again: str,
    *,
    resume: bool,
    address: str | None,
    profile: bool,
) -> Outcome:
    """Train in processes of Ray Train's."""
    if profile:
        raise UserError(
            "only a training by one process can be watched", where="--profile", hint="leave out --processes"
        )
    if address is None:
        find_training_data(config)  # what is wrong with it is told now, by one process, and not after Ray has started
    # Ray takes seconds to import.
    from pipeline.runs.processes import run_together

    def show(bar: Bar, row: dict[str, float]) -> None:
        _show(bar, row, config.train.epochs)

    with training(path):
        if not resume:
            RunFolder.require_free(path)  # another may have begun it since this command looked
        return run_together(config, path, address=address, request=request, again=again, show=show)


def _fit(trainer: Trainer, config: PipelineConfig, profile: StepProfile | None) -> Ending:
    with progress_bar("train", trainer.total_steps, "step", done=trainer.position.step) as bar:

        def after_step(row: dict[str, float]) -> None:
            _show(bar, row, config.train.epochs)
            if profile is not None:
                profile.after_step()

        ending = trainer.fit(after_step)
    if profile is not None:
        profile.finish()
        _tell_profile(profile)
    return ending


def _show(bar: Bar, row: dict[str, float], epochs: int) -> None:
    if "answer_loss" not in row:  # a step whose losses are not read: those of the last one stay
        bar.advance()
        return
    terms = [f"epoch {int(row['epoch']) + 1}/{epochs}", f"answer {row['answer_loss']:.3f}"]
    if "kd_loss" in row:
        terms.append(f"kd {row['kd_loss']:.3f}")
    bar.advance(note="  ".join(terms))


def _tell(outcome: Outcome, path: Path, again: str, *, as_json: bool) -> None:
    ending = outcome.ending
    best = ending.best
    if as_json:
        emit_json(
            {
                "run": str(path),
                "best": None if best is None else asdict(best),
                "steps": ending.at.step,
                "stopped": ending.stopped,
                "stopped_early": ending.early,
                "trained_parameters": outcome.trained_count,
            }
        )
    if ending.stopped:
        kept = "; its state is saved" if best is not None else ""
        where = f"step {ending.at.step} of {outcome.total_steps}"
        say(f"stopped after {where}{kept}; {again}")
        return
    assert best is not None
    accuracy = "" if best.val_top1 is None else f", validation accuracy {best.val_top1:.1%}"
    stale = counted(ending.at.stale, "time")
    early = f" (of {outcome.total_steps}: validation was no better {stale})" if ending.early else ""
    trained = f"trained {counted(ending.at.step, 'step')}{early}"
    with beside_json(as_json):
        print_answer(f"{trained}; best after epoch {best.epoch}{accuracy}; run {path}")


def _tell_profile(profile: StepProfile) -> None:
    if profile.breakdown is None:
        say("warning: the training ended before any step could be profiled")
        return
    found: Breakdown = profile.breakdown
    atomic_write_text(profile.folder / "breakdown.json", json.dumps(found.as_json(), indent=1) + "\n")
    rows = [
        [part, f"{1000 * seconds:.1f}", f"{seconds / found.step_s:.1%}"]
        for part, seconds in [*found.seconds.items(), ("whole step", found.step_s)]
    ]
    table(f"one training step (mean of {found.steps})", ["part", "ms", "share"], rows)
    print_answer(f"trace: {profile.folder / TRACE} (open it with https://ui.perfetto.dev or chrome://tracing)")


def of_folder(run: Path | None, name: str | None, *, resume: bool) -> dict[str, str]:
    """The settings that name a run by its folder; UserError if there is none to go on with, or another name as well."""
    if run is None:
        return {}
    if not resume:
        raise UserError("a run's folder is given to go on with it", where=run, hint="add --resume")
    if name is not None:
        raise UserError("the run has its name already", where=run, received=f"--name {name}", hint="leave out --name")
    path = run if run.name not in ("", "..") else run.resolve()
    return {"run.folder": str(path.parent), "run.name": path.name}
