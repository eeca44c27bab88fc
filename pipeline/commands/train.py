"""`pipeline train`: Stage 2."""

from dataclasses import asdict
from pathlib import Path

from pipeline.runs.processes import require_as_many, run_together
from pipeline.runs.run_folder import CONFIG, RunFolder
from pipeline.runs.training import Outcome, resumed_config, train
from pipeline.screen.console import beside_json, emit_json, print_answer, say
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig, Resolved, overlay
from stages.errors import UserError
from stages.networks.quantization import require_quantization
from stages.signals import Stopped, StopRequest, interruption_note
from stages.train.metric_log import require_wandb
from stages.train.processes import TrainingProcess
from stages.wording import counted

AGAIN = "go on by the same command and --resume"


def run(
    resolved: Resolved,
    *,
    resume: bool,
    as_json: bool,
    profile: bool = False,
    process: TrainingProcess | None = None,
    again: str = AGAIN,
) -> Path:
    """Train, print the summary, and return the run's folder.

    Args:
        resolved: the settings; with `train.processes` above 1, processes are started that train.
        resume: go on with a run.
        as_json: print the summary as JSON on stdout.
        profile: measure a few steps.
        process: this is one of several processes, which `torchrun` or `srun` has started.
        again: how a person goes on with a training that was stopped.

    Raises:
        Stopped: asked to stop by a signal; what was learned is saved.
        KeyboardInterrupt: asked before a first step, or twice by Ctrl-C.
    """
    path = locations.run_folder(resolved.config)
    if process is not None:
        require_as_many(resolved, process.place.size)
        resume = resume or (process.place.restarts > 0 and (path / CONFIG).is_file())
    config = resolved.config
    if resume:
        config = resumed_config(RunFolder.open(path), resolved)
    else:
        RunFolder.require_free(path)
    if process is not None:
        config = overlay(config, {"train.processes": process.place.size}, "torchrun or srun")
    _require_possible(config, profile=profile)
    request = StopRequest()
    with interruption_note(lambda: " before a first step; go on by the same command"), beside_json(as_json):
        if config.train.processes > 1 and process is None:
            outcome = run_together(config, path, resume=resume, request=request, again=again)
        else:
            group = None if process is None else process.join()
            outcome = train(config, path, request, resume=resume, again=again, profile=profile, group=group)
    with interruption_note(lambda: f"; {again}"):
        if process is None or process.place.rank == 0:
            _print_outcome(outcome, path, again, as_json=as_json)
        if outcome.ending.stopped:
            raise Stopped(request.exit_code)
        request.insist()
    return path


def _require_possible(config: PipelineConfig, *, profile: bool) -> None:
    """UserError if the settings ask for what this machine or so many processes cannot do."""
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
    if profile and config.train.processes > 1:
        raise UserError(
            "only a training by one process can be watched", where="--profile", hint="leave out --processes"
        )


def _print_outcome(outcome: Outcome, path: Path, again: str, *, as_json: bool) -> None:
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


def refuse_address(address: str | None) -> None:
    """UserError where a training is to go to a Ray cluster, as in earlier versions."""
    if address is not None:
        raise UserError(
            "a training does not use Ray",
            where="--address",
            received=address,
            hint="start it with torchrun or srun on each node, see docs/training.md",
        )
