"""The command line: commands gather their options; work and heavy imports are in `pipeline.commands`."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.command_groups import cache_app, config_app, data_app
from pipeline.options import (
    Commands,
    DataOptions,
    Dataset,
    Json,
    Overrides,
    RefreshChanged,
    RetryFailed,
    RunOrModel,
    SettingOptions,
    TaskName,
    with_groups,
)

if TYPE_CHECKING:
    from stages.shard import Shard

app = Commands(
    name="pipeline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Diff-LMM: teach a video LMM's Q-Former with a frozen diffusion transformer. "
    "Stage 1: extract. Stage 2: train, evaluate, predict.",
)
app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")
app.add_typer(data_app, name="data")

# What `plan` measures for by default, and `extract --dry-run` always.
_CALIBRATE_S = 20.0


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("diff-lmm"))
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the stages do.")] = False,
    # Eager, so that no command is asked for.
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from pipeline.screen.console import set_up_logging

    set_up_logging(verbose=verbose)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where videos, cache and run go.")] = Path("runs/demo"),
    overrides: Overrides = None,
    open_report: Annotated[
        bool, typer.Option("--open/--no-open", help="Show the report in the browser at the end, if there is a screen.")
    ] = True,
    json: Json = False,
) -> None:
    """The whole path on the bundled synthetic videos, on the CPU: generate, extract, train, evaluate, report."""
    from pipeline.commands.demo import run

    run(folder, overrides or [], open_report=open_report, as_json=json)


@app.command()
def synthesize(
    folder: Annotated[Path, typer.Argument(help="Where videos/ and annotations/ go.")] = Path("data/synthetic"),
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    size: Annotated[
        list[str] | None,
        typer.Option(help="SPLIT=VIDEOS, as in train=64; may be repeated. Splits not named keep their usual size."),
    ] = None,
) -> None:
    """Write the synthetic data set: real H.264 videos in which LVU's seven questions have visible answers."""
    from pipeline.commands.synthesize import parse_sizes, run

    run(folder, seed=seed, sizes=parse_sizes(size or ()))


@app.command()
@with_groups
def plan(
    *,
    data: DataOptions,
    retry_failed: RetryFailed = False,
    refresh_changed: RefreshChanged = False,
    calibrate_s: Annotated[float, typer.Option(help="Seconds to measure this machine for.")] = _CALIBRATE_S,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="Measure nothing: counts and bytes, times by arithmetic alone.")
    ] = False,
    measure_step: Annotated[
        bool, typer.Option("--measure-step", help="Measure a training step on a CPU, too; on a GPU it always is.")
    ] = False,
    settings: SettingOptions,
    json: Json = False,
) -> None:
    """What both stages would take: frames, bytes, hours, and what of the extraction is left. Nothing is written.

    Give it the options of the extraction. Its counts and bytes are exact and need the annotations and the networks'
    configuration files only, so the videos may come later. Times are measured: some planned videos are decoded, go
    through both networks and are written beside the cache, into a folder that is removed again. Without videos or
    weights there are no times. Nothing is fetched: for absent weights it prints the size of a download. It warns
    when the disk is too small for what is left.

    For the training of each task it prints parameters and bytes, the part of a batch that fits on this machine's GPU
    and on common ones, steps, multiply-adds, and hours: by arithmetic at an assumed share of a GPU's peak and, on a
    machine with a GPU, by one step of the true shapes with random weights. Without annotations the card's counts are
    taken.
    """
    from pipeline.commands.plan import run

    run(
        settings.resolve(data.dotted()),
        calibrate_s=None if no_calibrate else calibrate_s,
        retry_failed=retry_failed,
        refresh_changed=refresh_changed,
        as_json=json,
        measures_step=measure_step,
    )


@app.command()
@with_groups
def rehearse(
    *,
    dataset: Dataset = None,
    task: TaskName = None,
    language_layers: Annotated[
        int | None, typer.Option(min=1, help="Keep so many layers of the language model, for a quicker look.")
    ] = None,
    settings: SettingOptions,
    json: Json = False,
) -> None:
    """Every stage at the true sizes with random weights: whether this machine is good, before anything is downloaded.

    One short video is made and extracted, one training step taken on a clip with the data set's number of frames, one
    question answered by beam search. Each stage runs in a process of its own and reports its seconds and its peak of
    memory. Exit code 1 when one does not fit: the line says which, and which settings would do.
    """
    from pipeline.commands.rehearse import run

    options = {"data.dataset": dataset, "data.task": task}
    run(settings.resolve(options), language_layers=language_layers, as_json=json)


@app.command()
@with_groups
def extract(
    *,
    data: DataOptions,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, e.g. ray://head:10001; default this machine.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N: extract one of N like shares of the videos, in this process, without Ray. All N may write into "
            "one cache at once, as tasks of an array job."
        ),
    ] = None,
    retry_failed: RetryFailed = False,
    refresh_changed: RefreshChanged = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take and do nothing, as `pipeline plan` does.")
    ] = False,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="Print events on stdout, one JSON object a line; the last is --json's.")
    ] = False,
    settings: SettingOptions,
    json: Json = False,
) -> None:
    """Stage 1: decode the videos once and write features and teacher targets into the cache.

    Run it again to go on where it stopped. Exit code 3 when any video failed.
    """
    part = _shard_of(shard, {"--address": address is not None, "--dry-run": dry_run})
    resolved = settings.resolve(data.dotted())
    if dry_run:
        from pipeline.commands.plan import run_dry

        run_dry(
            resolved,
            calibrate_s=_CALIBRATE_S,
            retry_failed=retry_failed,
            refresh_changed=refresh_changed,
            as_json=json,
            as_lines=json_lines,
        )
        return
    from stages.signals import GO_ON, interruption_note

    with interruption_note(lambda: f"; {GO_ON}"):
        from pipeline.commands.extract import run

        failed = run(
            resolved,
            address=address,
            retry_failed=retry_failed,
            refresh_changed=refresh_changed,
            as_json=json,
            as_lines=json_lines,
            shard=part,
        )
    if failed:
        raise typer.Exit(3)


def _shard_of(text: str | None, beside: Mapping[str, bool]) -> "Shard | None":
    """The shard that --shard names; UserError where it is none, or an option is given that does not go with it."""
    if text is None:
        return None
    from stages.errors import UserError
    from stages.shard import Shard

    for option in (name for name, is_given in beside.items() if is_given):
        raise UserError("one shard runs in this process, and this option is for all of them", where=option)
    # The networks' threads share their cores with decode children, whom they must not keep waiting by spinning; libgomp
    # reads this when it is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return Shard.parse(text)


@app.command()
@with_groups
def train(
    *,
    data: DataOptions,
    name: Annotated[str | None, typer.Option(help="Name of the run; default <dataset>-<task>-<preset>.")] = None,
    run: Annotated[Path | None, typer.Argument(help="With --resume: folder of the run to go on with.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run, with its own settings, from its newest checkpoint.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile a few steps: a trace in RUN/profile and where the time goes.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes of this machine that train together, one per GPU (train.processes; default 1). "
            "Readers of the cache beside each of them: train.loader_workers.",
        ),
    ] = None,
    address: Annotated[str | None, typer.Option(hidden=True)] = None,
    settings: SettingOptions,
    json: Json = False,
) -> None:
    """Stage 2: train Q-Former, projections and gate from the cache.

    It may be killed at any moment: `pipeline train --resume RUN` goes on from the newest checkpoint as if nothing had
    happened, and takes more epochs with --set train.epochs=N. After Ctrl-C and SIGTERM it saves first; after SIGTERM, a
    scheduler's preemption, the exit code is 75.

    Several machines: start it with torchrun or srun; docs/training.md in the project's repository has scripts.
    """
    from pipeline.commands.train import of_folder, refuse_address
    from pipeline.commands.train import run as work
    from pipeline.runs.processes import started_process

    with started_process() as process:
        refuse_address(address)
        options = {**data.dotted(), "run.name": name, **of_folder(run, name, resume=resume)}
        resolved = settings.resolve({**options, "train.processes": processes})
        work(resolved, resume=resume, as_json=json, profile=profile, process=process)


@app.command()
@with_groups
def evaluate(
    *,
    run: RunOrModel,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    method: Annotated[
        str | None,
        typer.Option(help="generate (beam search), rank (candidates by likelihood) or both; default the run's."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for predictions and metrics; default the run's or the model's.")
    ] = None,
    data: DataOptions,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Answer a split and score it by exact match; writes predictions and metrics into the run.

    Data set, task and folders are the model's own unless given. docs/evaluation.md in the project's repository
    explains each number.
    """
    from pipeline.commands.evaluate import run as work

    work(
        run,
        split=split,
        method=method,
        options=data.dotted(),
        output=output,
        overrides=overrides or [],
        as_json=json,
    )


@app.command()
@with_groups
def ablate(
    *,
    study: Annotated[
        list[str],
        typer.Option(help="lambda, levels, weighting, teacher, memory, or a .yaml file. May be repeated."),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each member, from train.seed on.")] = 3,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Trainings at once; default one per GPU, or as many as the cores allow.")
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(min=0.01, help="CPU cores of each training; default an equal share.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0.0, help="GPUs of each, may be a fraction; default an equal share.")
    ] = None,
    data: DataOptions,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster that this machine is part of, e.g. auto; default this machine.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry failed videos and trainings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what there is to do, and do nothing.")] = False,
    settings: SettingOptions,
    json: Json = False,
) -> None:
    """Studies: many trainings that differ in a few settings, from one cache, in one table over seeds.

    Each training is an ordinary run in runs/<study>. Run it again to go on where it stopped. Exit code 3 when any
    training failed. docs/ablations.md in the project's repository explains the tables, and how to write a study.
    """
    from pipeline.studies.ablate import Resources, run

    failed = run(
        study,
        settings.resolve(data.dotted()),
        seeds=seeds,
        resources=Resources(parallel, cpus, gpus),
        address=address,
        dry_run=dry_run,
        retry_failed=retry_failed,
        as_json=json,
    )
    if failed:
        raise typer.Exit(3)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluated run, or of an evaluation's --output.")],
    second: Annotated[Path, typer.Argument(help="The other one.")],
    split: Annotated[
        str | None, typer.Option(help="train, val or test; default the first of test, val, train that both answered.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="generate or rank; default generate if both have it.")] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Compare the samples that both answered, and leave out the others.")
    ] = False,
    json: Json = False,
) -> None:
    """Whether one of two runs is better, task by task: McNemar's test, and the difference with its interval.

    Both must have answered the same samples. The interval is a paired bootstrap over videos.
    """
    from pipeline.commands.compare import run as work

    work(first, second, split=split, method=method, common=common, as_json=json)


@app.command()
def predict(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    question: Annotated[str, typer.Option(help='For example "what is the relationship of the movie?".')],
    run: RunOrModel,
    start: Annotated[float, typer.Option(help="Where the window begins, in seconds.")] = 0.0,
    method: Annotated[str, typer.Option(help="generate (beam search) or rank (a task's labels).")] = "generate",
    task: Annotated[
        str | None, typer.Option(help="The task whose labels are ranked; default the one that asks this question.")
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Answer one question about one video file, without a cache."""
    from pipeline.commands.predict import run as work

    work(
        video,
        question,
        run,
        start_s=start,
        method=method,
        task=task,
        overrides=overrides or [],
        as_json=json,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, e.g. runs/lvu-relationship-diff-lmm-7b.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the model; an empty folder or a new one.")],
    with_heads: Annotated[
        bool, typer.Option("--with-heads", help="Alignment heads and gate too, to go on distilling from them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the exported model that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a run's best checkpoint as a model of its own: trained parameters, configuration and a model card."""
    from pipeline.commands.export import run as work

    work(run, folder, with_heads=with_heads, as_json=json, overwrite=overwrite)


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; with --paper there may be none.")] = None,
    output: Annotated[Path | None, typer.Option(help="HTML file; default report.html in the first run.")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Show the runs beside the paper's tables, on the page and here.")
    ] = False,
    json: Json = False,
) -> None:
    """One self-contained HTML page about one or more runs: scores, curves, answers with frames, paired tests.

    With --paper every table of the paper is shown with the rows that the runs measured; a run on other data, other
    networks or a part of the data fills no cell, and the reason is named.
    """
    from pipeline.commands.report import run

    run(runs or [], output, paper=paper, as_json=json)


@app.command()
@with_groups
def doctor(
    *,
    data: DataOptions,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not open the videos to compare their lengths with the annotations.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 when something needed is missing or unusable.")
    ] = False,
    settings: SettingOptions,
    json: Json = False,
) -> None:
    """What is installed, which devices, weights and data are found, and what to do about what is missing."""
    from pipeline.commands.doctor import run

    all_there = run(settings.resolve(data.dotted()), as_json=json, quick=quick)
    if strict and not all_there:
        raise typer.Exit(3)


def main() -> None:
    """Run the command line: user errors become one line on stderr, everything else keeps its traceback."""
    try:
        app()
    except Exception as error:
        from stages.errors import user_error_of
        from stages.signals import is_interrupted

        if is_interrupted():
            raise  # of the interruption's making, which has its own line
        refusal = user_error_of(error)
        if refusal is None:
            raise
        sys.stderr.write(f"error: {refusal}\n")
        sys.exit(refusal.exit_code)
