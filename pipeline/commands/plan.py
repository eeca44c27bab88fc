"""`pipeline plan` and `pipeline extract --dry-run`: what both stages will take, before anything runs."""

from typing import Any

from pipeline.doctor.machine import absent_downloads
from pipeline.planning.extraction import extraction_json, look, measure, show_downloads, show_extraction
from pipeline.planning.measured_step import MeasuredStep, measure_step
from pipeline.planning.training import TrainingPlan, are_counted_by_card, plan_training
from pipeline.planning.training_answer import show_training, training_json
from pipeline.screen.console import beside_json, emit_json, emit_json_line, print_answer
from pipeline.settings import locations
from pipeline.settings.config import Resolved
from stages.errors import UserError
from stages.gpus import this_gpu
from stages.networks.memory_law import Parts
from stages.weights.repository import local_only


def run(
    resolved: Resolved,
    *,
    calibrate_s: float | None,
    retry_failed: bool,
    as_json: bool,
    refresh_changed: bool = False,
    measures_step: bool = False,
) -> None:
    """Print what the extraction of the configured data set takes, and the trainings on it.

    Args:
        resolved: the configuration, as `pipeline extract` and `pipeline train` get it.
        calibrate_s: seconds of decoding, encoding and writing to measure; None: nothing is measured.
        retry_failed: whether videos that failed before count as left.
        as_json: print one object on stdout, too.
        refresh_changed: whether videos whose files have changed count as left.
        measures_step: whether a training step is measured where there is no GPU, too.
    """
    if calibrate_s is not None and not 0 < calibrate_s < float("inf"):
        raise UserError(
            "not a time to measure for", where="--calibrate-s", received=calibrate_s, allowed="seconds, more than 0"
        )
    config = resolved.config
    survey = absent = training = None
    with local_only():
        if are_counted_by_card(config):
            absent = f"annotations folder not found: {locations.annotations_folder(config)}"
        else:
            survey = look(config, retry_failed=retry_failed, refresh_changed=refresh_changed)
        try:
            training, no_training = plan_training(config, None if survey is None else survey.manifest), ""
        except UserError as error:
            no_training = str(error)
        measured, why_not = (None, "") if survey is None else measure(survey, calibrate_s)
        step = no_training if training is None else _step(training, calibrate_s, on_cpu=measures_step)
    frames = None if survey is None else survey.plan.num_frames
    downloads = absent_downloads(config) if survey is None else survey.downloads
    content: dict[str, Any] = {
        "preset": config.preset,
        "downloads": downloads,
        **({} if survey is None else extraction_json(survey, measured, why_not)),
        "no_extraction": absent,
        "training": None if training is None else training_json(training, frames, step),
        "no_training": no_training or None,
    }
    if as_json:
        emit_json(content)
    with beside_json(as_json):
        if survey is None:
            print_answer(f"extraction: frames, bytes and hours are unknown: {absent}")
            show_downloads(downloads)
        else:
            show_extraction(survey, measured, why_not)
        if training is None:
            print_answer(f"training: unknown: {no_training}")
        else:
            show_training(training, frames, step)


def run_dry(
    resolved: Resolved,
    *,
    calibrate_s: float,
    retry_failed: bool,
    refresh_changed: bool,
    as_json: bool,
    as_lines: bool,
) -> None:
    """Print what an extraction takes; arguments as `run`, and `as_lines` prints it on one line, as an event."""
    with local_only():
        survey = look(resolved.config, retry_failed=retry_failed, refresh_changed=refresh_changed)
        measured, why_not = measure(survey, calibrate_s)
    content = extraction_json(survey, measured, why_not)
    if as_lines:
        emit_json_line({"event": "plan", **content})
    elif as_json:
        emit_json(content)
    with beside_json(as_json or as_lines):
        show_extraction(survey, measured, why_not)


def _step(plan: TrainingPlan, calibrate_s: float | None, *, on_cpu: bool) -> MeasuredStep | str:
    """A measured step, or why there is none."""
    gpu, widest = this_gpu(), plan.widest
    if calibrate_s is None:
        return "not asked for"
    if gpu is None and not on_cpu:
        return "this machine has no GPU (--measure-step: on its CPU, which may take many minutes)"
    if not widest.steps:
        return "there is no training sample"
    parts = Parts(1, widest.estimate.frames_per_chunk) if gpu is None else plan.fit(gpu)
    if parts is None:
        return "no clip fits on this machine's GPU"
    return measure_step(plan.config, plan.shape, widest.example, parts, widest.estimate.step_multiply_adds)
