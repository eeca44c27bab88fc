"""A training in this process: what it starts from, its course, and what a resumed one may change."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.runs.cached_data import find_training_data, warn_of_absent_labels
from pipeline.runs.models import LoadedModel, build_for_training, warn_of_long_questions, write_loading
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.small_world import warn_of_unknown_data
from pipeline.screen.console import Bar, print_answer, progress_bar, say, table
from pipeline.settings.config import PipelineConfig, Resolved, overlay, settings_of
from stages.atomic import atomic_write_text
from stages.batches.control_targets import ShuffledTargets
from stages.batches.windows import WindowDataset
from stages.data.leakage import leakage_sentence
from stages.errors import UserError
from stages.networks.checkpoint import Checkpoints, Position
from stages.signals import StopRequest, interruption_note
from stages.train.group import Group
from stages.train.profile import TRACE, Breakdown, StepProfile
from stages.train.run_lock import training as locked
from stages.train.trainer import Data, Ending, Trainer
from stages.wording import counted


@dataclass(frozen=True)
class Outcome:
    """How a training ended, of how many steps, with how many trained values."""

    ending: Ending
    total_steps: int
    trained_count: int

    def to_json(self) -> str:
        """As text, to be sent."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """Read back what `to_json` wrote."""
        content = json.loads(text)
        ending = content.pop("ending")
        at, best = (None if (one := ending.pop(name)) is None else Position(**one) for name in ("at", "best"))
        assert at is not None
        return cls(Ending(at, best, **ending), **content)


# What changes nothing of what comes out: how it is computed and kept.
FREE = (
    "cache.root",
    "cache.local_copy",
    # The same batches in the same order; sums are rounded in another order.
    "train.processes",
    "train.shard_language",
    "train.micro_batch_size",
    "train.frames_per_chunk",
    "evaluate.batch_size",
    "evaluate.rank_rows",
    "train.loader_workers",
    "train.prefetch",
    "train.log_every",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.trackers",
    "train.wandb_project",
)


# What a run may have changed when it is resumed.
_MAY_CHANGE = (
    *FREE,
    "data.videos",  # training reads none
    # When it ends.
    *("train.epochs", "train.patience"),
)


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


def prepare_training(
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
        evaluate=config.evaluate,
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
        on_parts=lambda parts: RunFolder(path).note_parts(parts),
    )
    return trainer, loaded, stamp


def train(
    config: PipelineConfig,
    path: Path,
    request: StopRequest,
    *,
    resume: bool,
    again: str,
    profile: bool = False,
    group: Group | None = None,
) -> Outcome:
    """Begin a run, or go on with it, in this process, until its end or the wish to stop.

    Args:
        config: the recipe.
        path: the run's folder.
        request: takes the wish to stop.
        resume: the run has begun.
        again: how a person goes on after a stop.
        profile: measure a few steps.
        group: the processes that train it together; the first of them is the only one that writes.
    """
    trainer, loaded, stamp = prepare_training(config, path, request, group)
    is_first = group is None or group.rank == 0
    with locked(path) if is_first else nullcontext():
        if is_first:
            begin(path, config, loaded, stamp, resume=resume)
        # In a group the first process finds the checkpoint for all.
        if (resume or group is not None) and trainer.resume(lambda line: say(f"warning: {line}")):
            say(f"resuming {path} after step {trainer.position.step} of {trainer.total_steps}")
        with request.listening(), interruption_note(lambda: f"; {again}"):
            ending = _fit(trainer, config, StepProfile(path / "profile", loaded.compute.device) if profile else None)
    return Outcome(ending, trainer.total_steps, loaded.trained_count)


def resumed_config(run: RunFolder, resolved: Resolved) -> PipelineConfig:
    """The run's own settings with what the command names itself; UserError if that would be another training."""
    saved = run.config()
    now, before = settings_of(resolved.config), settings_of(saved)
    given = {key: value for key, value in now.items() if resolved.given is None or key in resolved.given}
    for key, value in given.items():
        was = before.get(key)
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


def _fit(trainer: Trainer, config: PipelineConfig, profile: StepProfile | None) -> Ending:
    with progress_bar("train", trainer.total_steps, "step", done=trainer.position.step) as bar:

        def after_step(row: dict[str, float]) -> None:
            _show(bar, row, config.train.epochs)
            if profile is not None:
                profile.after_step()

        ending = trainer.fit(after_step)
    if profile is not None:
        profile.finish()
        _print_profile(profile)
    return ending


def _show(bar: Bar, row: dict[str, float], epochs: int) -> None:
    if "answer_loss" not in row:  # a step whose losses are not read: those of the last one stay
        bar.advance()
        return
    terms = [f"epoch {int(row['epoch']) + 1}/{epochs}", f"answer {row['answer_loss']:.3f}"]
    if "kd_loss" in row:
        terms.append(f"kd {row['kd_loss']:.3f}")
    bar.advance(note="  ".join(terms))


def _print_profile(profile: StepProfile) -> None:
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
