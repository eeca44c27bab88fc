"""`pipeline train`: Stage 2."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline import locations
from pipeline.config import PipelineConfig, Resolved, overlay, valid_keys
from pipeline.console import Bar, beside_json, emit_json, print_answer, progress_bar, say, table
from pipeline.outcome import Outcome
from pipeline.run_folder import RunFolder
from pipeline.small_world import warn_of_unknown_data
from pipeline.stage2 import (
    LoadedModel,
    build_for_training,
    find_training_data,
    warn_of_absent_labels,
    warn_of_long_questions,
    write_loading,
)
from stages.atomic import atomic_write_text
from stages.batches.control_targets import ShuffledTargets
from stages.batches.windows import WindowDataset
from stages.data.leakage import leakage_sentence
from stages.errors import UserError
from stages.networks.checkpoint import Checkpoints
from stages.networks.quantization import require_quantization
from stages.signals import Stopped, StopRequest, telling
from stages.train.group import Group
from stages.train.metric_log import require_wandb
from stages.train.profile import TRACE, Breakdown, StepProfile
from stages.train.run_lock import training
from stages.train.trainer import Data, Ending, Trainer
from stages.wording import counted

AGAIN = "go on by the same command and --resume"

# What changes nothing of what comes out: how it is computed and kept.
FREE = (
    "cache.root",
    "cache.local_copy",
    # The same batches in the same order; sums are rounded in another order, and dropout draws other numbers.
    "train.processes",
    "train.shard_language",
    "train.workers",
    "train.prefetch",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.trackers",
    "train.wandb_project",
)
# What a run may have changed when it is resumed.
_MAY_CHANGE = (
    *FREE,
    "data.videos",  # training reads none
    # Rounding and dropout's draws, as above.
    *("train.micro_batch_size", "train.frames_per_run", "evaluate.batch_size"),
    # When it ends.
    *("train.epochs", "train.patience"),
)


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
        config = _resumed(RunFolder.open(path), resolved)
    else:
        RunFolder.require_free(path)
    if "wandb" in config.train.trackers:
        require_wandb()
    if config.train.shard_language != "none" and config.train.processes == 1:
        raise UserError(
            "one process has nobody to share the language model with",
            where="train.shard_language",
            received=config.train.shard_language,
            hint="train with --workers 2 or more, or without it",
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
        raise UserError("only a training by one process can be watched", where="--profile", hint="leave out --workers")
    if address is None:
        find_training_data(config)  # what is wrong with it is told now, by one process, and not after Ray has started
    # Ray takes seconds to import.
    from pipeline.processes import run_together

    def show(bar: Bar, row: dict[str, float]) -> None:
        _show(bar, row, config.train.epochs)

    with training(path):
        if not resume:
            RunFolder.require_free(path)  # another may have begun it since this command looked
        return run_together(config, path, address=address, request=request, again=again, show=show)


def begin(path: Path, config: PipelineConfig, loaded: LoadedModel, stamp: dict[str, object], *, resume: bool) -> None:
    """Fill a new run's folder, or look at an old one again; UserError if its data are not what they were."""
    if resume:
        folder = RunFolder.open(path)
        folder.require_same(stamp, ("fingerprint", "samples", "videos_missing"))
        _keep_changes(folder, config)
        return
    RunFolder.require_free(path)  # another may have begun it since this command looked
    write_loading(path, loaded.loading)
    RunFolder.create(path, config, stamp)


def prepare(
    config: PipelineConfig, path: Path, stop: Callable[[], bool], group: Group | None = None
) -> tuple[Trainer, LoadedModel, dict[str, object]]:
    """Look at the data, build the model; and what the run is stamped with."""
    found = find_training_data(config)
    cache, train, val, left_out = found.cache, found.train, found.val, found.found.left_out()
    warn_of_unknown_data(config)
    warn_of_absent_labels(train, found.manifest.samples)
    loaded = build_for_training(config, cache, train[0])
    warn_of_long_questions(loaded.tokenizers, [(sample.question, sample.prompt) for sample in [*train, *val]])
    stamp: dict[str, object] = {
        "cache": str(cache.root),
        "fingerprint": cache.fingerprint.digest,
        "samples": {"train": len(train), "val": len(val)},
        "videos_missing": list(found.found.failed),
        "videos_damaged": list(found.found.damaged),
        "samples_missing": list(found.found.beyond),
        "videos_left_out": sorted(found.manifest.left_out),
        "leaks": found.leaks,
    }
    if found.leaks:
        say(f"warning: {leakage_sentence(found.leaks)}")
    if found.manifest.left_out:
        without = counted(len(found.manifest.left_out), "annotated video has", "annotated videos have")
        say(f"warning: {without} no samples; see `pipeline doctor`")
    say(
        f"{len(train)} training and {counted(len(val), 'validation sample')}"
        + (f"; {left_out}" if left_out else "")
        + f"; training {loaded.trained_count:,} parameters, {loaded.frozen_count:,} frozen, on {loaded.compute.device}"
    )
    tolerance, distils = config.cache.tolerance_s, config.alignment.kd_weight > 0
    control = None
    if distils and config.train.targets == "shuffled":
        say("warning: train.targets=shuffled aligns every frame with another video's y*; this is a control")
        control = ShuffledTargets(cache, (sample.video for sample in train), seed=config.train.seed)
    data = Data(
        train=WindowDataset(cache, train, tolerance_s=tolerance, with_targets=distils, control=control),
        val=WindowDataset(cache, val, tolerance_s=tolerance, with_targets=False) if val else None,
        tokenizers=loaded.tokenizers,
        eval_batch_size=config.evaluate.batch_size,
    )
    trainer = Trainer(
        config.train,
        config.language,
        loaded.model,
        data,
        run=path,
        compute=loaded.compute,
        stop=stop,
        group=group,
    )
    return trainer, loaded, stamp


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


def _resumed(run: RunFolder, resolved: Resolved) -> PipelineConfig:
    """The run's own settings with what the command names itself; UserError if that would be another training."""
    saved = run.config()
    given = {key: _at(resolved.config, key) for key in valid_keys() if resolved.given is None or key in resolved.given}
    for key, value in given.items():
        was = _at(saved, key)
        if value != was and key not in _MAY_CHANGE and not key.startswith("run."):
            raise UserError(
                f"--resume keeps the run's own settings, but the command differs in {key} ({was!r}, now {value!r})",
                where=run.path,
                hint="leave it out, or give another --name for a new run",
            )
    config = overlay(saved, {**given, "run.folder": str(run.path.parent), "run.name": run.path.name}, "command line")
    if config.train.epochs < saved.train.epochs:
        raise UserError(
            "a run that is resumed can only be given more epochs",
            where=f"{run.path}: train.epochs",
            received=config.train.epochs,
            allowed=f"{saved.train.epochs} or more",
        )
    return config


def _keep_changes(run: RunFolder, config: PipelineConfig) -> None:
    """Have the run's folder say what the run is from now on."""
    saved = run.config()
    before, now = saved.train.epochs, config.train.epochs
    if now > before:
        last = Checkpoints(run.path).last()
        step = 0 if last is None else Checkpoints(run.path).position(last).step
        say(f"train.epochs is {now}, and was {before}; from step {step} on the learning rate is that of {now} epochs")
        run.note_more_epochs(step=step, before=before, now=now)
    if saved != config:
        run.keep(config)


def _at(config: PipelineConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
