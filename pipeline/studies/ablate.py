"""`pipeline ablate`: studies of many trainings, each an ordinary run, from as few caches as their features need."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.commands import report
from pipeline.screen.console import PEOPLE, Bar, beside_json, emit_json, print_answer, progress_bar, say, table
from pipeline.settings.config import Resolved
from pipeline.studies.caches import StudyCache, caches_of, extract_missing
from pipeline.studies.members import STUDY, Planned, Training, is_finished, plan_study
from pipeline.studies.page import print_tables, write_page
from pipeline.studies.plot import write_plots
from pipeline.studies.record import StudyRecord, TrainingState, read_failures, record_of, write_record
from pipeline.studies.trial import Trial, run_trial
from stages.errors import UserError
from stages.signals import interruption_note
from stages.train.run_lock import training
from stages.wording import counted

_REPORT = "report.html"
_LOGS = "logs"
_CLIENT = "ray://"


@dataclass(frozen=True)
class Resources:
    """What the command says of parallel trainings; None leaves it to the machine."""

    parallel: int | None = None
    cpus: float | None = None
    gpus: float | None = None


def run(
    names: Sequence[str],
    resolved: Resolved,
    *,
    seeds: int,
    resources: Resources,
    address: str | None,
    dry_run: bool,
    retry_failed: bool,
    as_json: bool,
) -> bool:
    """Bring every study to its end, print and write its tables, and say whether any training has failed.

    Args:
        names: studies by name or file; a training that two of them need is done once.
        resolved: the base configuration.
        seeds: how many seeds each member has.
        resources: trainings at once, and what each gets.
        address: Ray cluster; None: one on this machine.
        dry_run: say what there is to do, and do nothing.
        retry_failed: do again what failed before, videos and trainings.
        as_json: print the studies as JSON on stdout.

    Raises:
        UserError: a study, a setting or a folder is wrong, or there are neither features nor videos.
    """
    if address is not None and address.startswith(_CLIENT):
        raise UserError(
            "a study is led from within its cluster",
            where="--address",
            received=address,
            hint="run the command on a node of the cluster, with --address auto",
        )
    if resolved.config.train.processes > 1:
        raise UserError(
            "the trainings of a study have one process each",
            where="train.processes",
            received=resolved.config.train.processes,
            allowed="1",
            hint="use several GPUs with --parallel, which runs as many trainings at once",
        )
    studies, trainings = _shared([plan_study(name, resolved, seeds) for name in dict.fromkeys(names)])
    if dry_run:
        progress = _Progress(studies, trainings, retry_failed=retry_failed)
        _print_plan(progress, caches_of(trainings.values()), as_json=as_json)
        return False
    with _locked(studies), beside_json(as_json):
        progress = _Progress(studies, trainings, retry_failed=retry_failed)
        caches = extract_missing(trainings.values(), address=address, retry_failed=retry_failed)
        progress.caches = {cache.fingerprint or "": cache.root for cache in caches}
        trained = counted(len(trainings), "different training")
        say(f"{trained}, features from {', '.join(progress.caches.values())}")
        progress.write()
        if progress.left:
            _train(progress, resources, address, readers=resolved.config.train.loader_workers)
        records = [_finish(planned, progress) for planned in studies]
    if as_json:
        emit_json([record.model_dump(mode="json") for record in records])
    return any(one.state == "failed" for record in records for one in record.trainings)


@contextmanager
def _locked(studies: Sequence[Planned]) -> Iterator[None]:
    """Be the only call that works on these studies."""
    with ExitStack() as locks:
        for planned in studies:
            try:
                locks.enter_context(training(planned.folder))
            except UserError as error:
                where, hint = planned.folder, "wait until it has ended"
                raise UserError("another call works on this study", where=where, hint=hint) from error
        yield


def _shared(studies: Sequence[Planned]) -> tuple[list[Planned], dict[str, Training]]:
    """The studies with one run for equal settings, in the folder of the first that wants it; all runs by digest."""
    folders = [planned.folder for planned in studies]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError("two studies have one name", where="--study", received=folder.name)
    found: dict[str, Training] = {}
    for planned in studies:
        for one in planned.trainings:
            if one.digest not in found or (one.path.exists() and not found[one.digest].path.exists()):
                found[one.digest] = one
    shared = [
        replace(planned, trainings=tuple(replace(one, config=found[one.digest].config) for one in planned.trainings))
        for planned in studies
    ]
    return shared, found


def _states(
    studies: Sequence[Planned], trainings: dict[str, Training], *, retry_failed: bool
) -> dict[str, TrainingState]:
    failed = {digest: state for planned in studies for digest, state in read_failures(planned).items()}
    states = {}
    for digest, one in trainings.items():
        if is_finished(one):
            states[digest] = _state(one, "done")
        elif digest in failed and not retry_failed:
            states[digest] = failed[digest]
        else:
            states[digest] = _state(one, "left")
    return states


def _state(one: Training, state: str, reason: str | None = None) -> TrainingState:
    log = str(log_of(one)) if reason is not None and log_of(one).is_file() else None
    return TrainingState.model_validate(
        {"seed": one.seed, "run": str(one.path), "digest": one.digest, "state": state, "reason": reason, "log": log}
    )


def log_of(one: Training) -> Path:
    """Where a training's output goes."""
    return one.path.parent / _LOGS / f"{one.path.name}.log"


class _Progress:
    """How far the studies are; every change is written at once, so that a failure is known to the next call."""

    def __init__(self, studies: Sequence[Planned], trainings: dict[str, Training], *, retry_failed: bool) -> None:
        self.studies, self.trainings = studies, trainings
        self.states = _states(studies, trainings, retry_failed=retry_failed)
        self.caches: dict[str, str] = {}
        self.running: set[str] = set()
        self.began_s, self.ended_now = time.monotonic(), 0

    @property
    def left(self) -> list[Training]:
        """What is still to do, seed by seed, so that every member has its first seed early."""
        left = [one for digest, one in self.trainings.items() if self.states[digest].state == "left"]
        return sorted(left, key=lambda one: one.seed)

    def count(self, state: str) -> int:
        """Trainings in a state."""
        return sum(one.state == state for one in self.states.values())

    def start(self, digest: str) -> None:
        """A training has begun."""
        self.running.add(digest)

    def end(self, digest: str, reason: str | None) -> None:
        """A training has ended, well if there is no reason why not."""
        self.running.discard(digest)
        self.ended_now += 1
        one = self.trainings[digest]
        if reason is None and not is_finished(one):
            reason = "its run was not finished although the training ended"
        self.states[digest] = _state(one, "done" if reason is None else "failed", reason)
        self.write()

    def write(self) -> None:
        """Write every study's file, without tables."""
        for planned in self.studies:
            write_record(planned, record_of(planned, self.states, self.caches, scored=False))

    def note(self) -> str:
        """How many run, failed and are left, and how long that may take at the rate so far."""
        left = len(self.left)
        waiting = left - len(self.running)
        parts = [f"{len(self.running)} running", f"{self.count('failed')} failed", f"{waiting} waiting"]
        if self.ended_now and left:
            minutes = (time.monotonic() - self.began_s) / self.ended_now * left / 60
            parts.append(f"about {minutes:.0f} min left")
        return ", ".join(parts)


def _train(progress: _Progress, resources: Resources, address: str | None, *, readers: int) -> None:
    before = counted(progress.count("done"), "is", "are")
    say(f"starting Ray for {counted(len(progress.left), 'training')}, {before} done")
    # Ray takes seconds to import; a finished study never gets here.
    from stages.cluster.connect import cluster
    from stages.cluster.shares import share_of
    from stages.studies.trials import run_trials

    trials = {one.digest: Trial(one, log_of(one), Path.cwd()) for one in progress.left}
    total = len(progress.trainings)
    with (
        progress_bar("ablate", total, "training", done=total - len(trials)) as bar,
        interruption_note(
            lambda: (
                f"; {progress.count('done')} of {counted(total, 'training is', 'trainings are')} done, "
                "run the same command again to go on"
            )
        ),
        cluster(address),
    ):
        share = share_of(
            resources.parallel, resources.cpus, resources.gpus, trials=len(trials), cores_wanted=1 + readers
        )
        at_once = counted(share.parallel, "training")
        say(f"{at_once} at once, each with {share.cpus:g} of the cores and {share.gpus:g} of the GPUs")
        on_start = _on_start(progress, bar)
        run_trials(trials, run_trial, share, on_start=on_start, on_end=_on_end(progress, bar))


def _on_start(progress: _Progress, bar: Bar) -> Callable[[str], None]:
    def on_start(digest: str) -> None:
        progress.start(digest)
        bar.advance(0, progress.note())

    return on_start


def _on_end(progress: _Progress, bar: Bar) -> Callable[[str, str | None, float], None]:
    def on_end(digest: str, reason: str | None, seconds: float) -> None:
        progress.end(digest, reason)
        one, state = progress.trainings[digest], progress.states[digest]
        name = f"{one.path.parent.name}/{one.path.name}"
        if state.state == "failed":
            say(f"failed {name}: {_why(state)}")
        elif not PEOPLE.is_terminal:
            say(f"done {name} in {seconds:.0f} s; {progress.note()}")
        bar.advance(note=progress.note())

    return on_end


def _why(failed: TrainingState) -> str:
    return f"{failed.reason}" + (f" (output: {failed.log})" if failed.log is not None else "")


def _finish(planned: Planned, progress: _Progress) -> StudyRecord:
    """Write a study's table, picture and pages, and print what came out."""
    record = record_of(planned, progress.states, progress.caches, scored=True)
    write_record(planned, record)
    plots = write_plots(record, planned.folder)
    done = [Path(one.run) for one in record.trainings if one.state == "done"]
    page = report.run(done, planned.folder / _REPORT, as_json=False) if done else None
    own = write_page(record, planned.folder, plots[0] if plots else None, page)
    print_tables(record, table)
    for member in record.members:
        for one in member.trainings:
            if one.state == "failed":
                print_answer(f"failed {planned.study.name} {member.name} seed {one.seed}: {_why(one)}")
    print_answer(f"study {planned.study.name}: {own}, {planned.folder / STUDY}")
    return record


def _print_plan(progress: _Progress, caches: Sequence[StudyCache], *, as_json: bool) -> None:
    if as_json:
        emit_json(
            {
                "trainings": [one.model_dump(mode="json") for one in progress.states.values()],
                "caches": [{"root": one.root, "missing": one.missing} for one in caches],
            }
        )
    with beside_json(as_json):
        for planned in progress.studies:
            rows = [
                [one.member.label, str(one.seed), progress.states[one.digest].state, str(one.path)]
                for one in planned.trainings
            ]
            table(f"{planned.study.name}: {planned.study.title}", ["member", "seed", "state", "run"], rows)
        for cache in caches:
            print_answer(f"cache {cache.root}: {'to be extracted' if cache.missing else 'complete'}")
        counts = ", ".join(f"{progress.count(state)} {state}" for state in ("done", "failed", "left"))
        print_answer(f"{counted(len(progress.states), 'different training')}: {counts}")
