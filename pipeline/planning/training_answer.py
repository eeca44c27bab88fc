"""A plan of trainings as `pipeline plan` prints it, for machines and for people."""

from dataclasses import asdict
from typing import Any

from pipeline.planning.extraction import show_assumed
from pipeline.planning.measured_step import MeasuredStep
from pipeline.planning.training import TaskPlan, TrainingPlan
from pipeline.screen.console import print_answer, table
from stages.data.manifest import SPLITS
from stages.gpus import ASSUMED_SHARE, COMMON_GPUS, GB, Gpu, this_gpu
from stages.wording import byte_size, counted, large_count, rough_time

_NONE = "-"


def _gpus() -> list[Gpu]:
    """The common ones and this machine's."""
    own = this_gpu()
    return [*COMMON_GPUS, *([] if own is None else [own])]


def training_json(plan: TrainingPlan, frames: int | None, measured: MeasuredStep | str) -> dict[str, Any]:
    """For machines.

    Args:
        plan: of the trainings.
        frames: that the extraction computes; None: not known.
        measured: a step on this machine, or why there is none.
    """
    train, widest = plan.config.train, plan.widest
    extraction = None
    if frames is not None and plan.frame_multiply_adds is not None:
        multiply_adds = frames * plan.frame_multiply_adds
        by_arithmetic = {gpu.name: _hours(gpu.seconds(multiply_adds)) for gpu in _gpus()}
        extraction = {"frames": frames, "multiply_adds": multiply_adds, "hours_by_arithmetic": by_arithmetic}
    return {
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "counted_by_card": list(plan.from_card),
        "assumed": list(plan.assumed),
        "tokens_assumed": plan.are_tokens_assumed,
        "assumed_share_of_peak": ASSUMED_SHARE,
        "clip": asdict(widest.estimate.clip),
        "parts": [asdict(part) for part in widest.estimate.parts],
        "multiply_adds_per_step": widest.step_multiply_adds,
        "gpus": [_gpu_json(plan, gpu) for gpu in _gpus()],
        "tasks": [_task_json(plan, task, measured) for task in plan.tasks],
        "extraction": extraction,
        "measured": None if isinstance(measured, str) else asdict(measured),
        "not_measured": measured if isinstance(measured, str) else None,
    }


def _gpu_json(plan: TrainingPlan, gpu: Gpu) -> dict[str, Any]:
    fits = {"fit": plan.fit(gpu), "fit_in_4_bits": plan.fit(gpu, in_4_bits=True)}
    return {**asdict(gpu), **{name: None if fit is None else asdict(fit) for name, fit in fits.items()}}


def _task_json(plan: TrainingPlan, task: TaskPlan, measured: MeasuredStep | str) -> dict[str, Any]:
    own = None if isinstance(measured, str) else _hours(measured.seconds_for(task.total))
    return {
        "task": task.task,
        "samples": task.samples,
        "steps": task.steps,
        "multiply_adds": task.multiply_adds,
        "hours_by_arithmetic": {gpu.name: _hours(_seconds(plan, gpu, task.total)) for gpu in _gpus()},
        "hours_measured": own,
    }


def _seconds(plan: TrainingPlan, gpu: Gpu, multiply_adds: int) -> float | None:
    """By arithmetic; None where no clip fits or the peak is not known."""
    return None if plan.fit(gpu) is None else gpu.seconds(multiply_adds)


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def show_training(plan: TrainingPlan, frames: int | None, measured: MeasuredStep | str) -> None:
    """For people; arguments as `training_json`."""
    train, widest = plan.config.train, plan.widest
    print_answer(
        f"training, preset {plan.config.preset}: a model for each task, {counted(train.epochs, 'epoch')} of batches of "
        f"{train.batch_size} clips of {counted(widest.estimate.clip.frames, 'frame')}; a step takes "
        f"{large_count(widest.step_multiply_adds)} multiply-adds"
    )
    if plan.from_card:
        splits = ", ".join(plan.from_card)
        print_answer(f"  samples of {splits} as the card counts them, because their annotations are not here")
    show_assumed(plan.assumed)
    if plan.are_tokens_assumed:
        clip = widest.estimate.clip
        print_answer(f"  {clip.words} tokens of a question and {clip.sequence} of the whole sequence are assumed")
    rows = [
        (part.name, "trained" if part.is_trained else "frozen", f"{part.parameters:,}", byte_size(part.num_bytes))
        for part in widest.estimate.parts
    ]
    columns: tuple[str, ...] = ("part", "", "parameters", "bytes")
    table("networks while training; trained ones with gradients and moments", columns, rows)
    columns = ("GPU", "memory", "clips", "frames at once", "clips with nf4", "a step")
    title = f"the part of a batch that fits; times by arithmetic at {ASSUMED_SHARE:.0%} of the GPU's peak (assumed)"
    table(title, columns, [_fits_row(plan, gpu) for gpu in _gpus()])
    _show_hours(plan, frames, measured)
    if isinstance(measured, str):
        print_answer(f"hours on this machine: not measured: {measured}")
    else:
        peak = "" if measured.peak_bytes is None else f", {byte_size(measured.peak_bytes)} at most"
        print_answer(
            f"measured on {measured.device}: a part of {counted(measured.clips, 'clip')}, "
            f"{counted(measured.frames, 'frame')} at once: {rough_time(measured.seconds)}{peak}"
        )


def _fits_row(plan: TrainingPlan, gpu: Gpu) -> tuple[str, ...]:
    fit, in_4_bits = plan.fit(gpu), plan.fit(gpu, in_4_bits=True)
    clips, at_once = (_NONE, _NONE) if fit is None else (f"{fit.clips}", f"{fit.frames}")
    with_nf4 = _NONE if in_4_bits is None else f"{in_4_bits.clips}"
    step = _time(_seconds(plan, gpu, plan.widest.step_multiply_adds))
    return gpu.name, f"{gpu.memory_bytes / GB:.0f} GB", clips, at_once, with_nf4, step


def _time(seconds: float | None) -> str:
    return _NONE if seconds is None else rough_time(seconds)


def _show_hours(plan: TrainingPlan, frames: int | None, measured: MeasuredStep | str) -> None:
    """A line for each task's training, with its validations and an evaluation, and one for the extraction."""
    gpus = _gpus()
    own = None if isinstance(measured, str) else measured

    def row(name: str, samples: str, steps: str, total: int) -> tuple[str, ...]:
        times = [_time(_seconds(plan, gpu, total)) for gpu in gpus]
        times += [] if own is None else [_time(own.seconds_for(total))]
        return name, samples, steps, large_count(total), *times

    splits = [split for split in SPLITS if any(split in task.samples for task in plan.tasks)]
    rows = [
        row(task.task, " / ".join(f"{task.samples.get(one, 0):,}" for one in splits), f"{task.steps:,}", task.total)
        for task in plan.tasks
    ]
    if len(plan.tasks) > 1:
        steps = sum(task.steps for task in plan.tasks)
        rows.append(row(f"all {len(plan.tasks)}", "", f"{steps:,}", sum(task.total for task in plan.tasks)))
    if frames is not None and plan.frame_multiply_adds is not None:
        total = frames * plan.frame_multiply_adds
        times = (_time(gpu.seconds(total)) for gpu in gpus)
        of_extraction = ("extraction, its networks alone", counted(frames, "frame"), "", large_count(total), *times)
        rows.append((*of_extraction, *([] if own is None else [_NONE])))
    columns = ("task", " / ".join(splits), "steps", "multiply-adds", *(gpu.name for gpu in gpus))
    columns += () if own is None else (f"{own.device}, measured",)
    table(f"time, validations and evaluation included, by arithmetic at {ASSUMED_SHARE:.0%} of peak", columns, rows)
