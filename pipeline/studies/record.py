"""What is known of a study: the state of every training, and the table of its members; written as `study.json`."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.reporting.paper import PublishedTable, published_tables
from pipeline.runs.results import read_predictions, result_path
from pipeline.runs.run_folder import versions
from pipeline.studies.members import SPLIT, STUDY, Planned
from stages.atomic import atomic_write_text
from stages.evaluate.comparison import PairedComparison
from stages.evaluate.metrics import majority_floor
from stages.evaluate.scoring import Method, Prediction
from stages.records import parse_record, read_json
from stages.studies.study import ALL_TASKS, Member, compare_seeds, over_seeds, pooled

State = Literal["done", "failed", "left"]
_BySeed = dict[int, list[Prediction]]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingState(_Record):
    """One training: how far it is, where it is, and if it failed, why and where its output is."""

    seed: int
    run: str
    digest: str
    state: State
    reason: str | None = None
    log: str | None = None


class TaskLine(_Record):
    """One member on one task, shares of right answers.

    Attributes:
        mean: over seeds.
        std: sample standard deviation over seeds; None for one seed.
        by_seed: each seed's.
        against_base: compared with the base over the seeds that both have, pooled; None for the base itself.
        seeds_better: seeds with which it is better than the base with the same seed, of `seeds_compared`.
        seeds_compared: seeds that both have.
    """

    mean: float
    std: float | None
    by_seed: dict[int, float]
    against_base: PairedComparison | None = None
    seeds_better: int = 0
    seeds_compared: int = 0


class MemberLine(_Record):
    """One member; `paper` is the paper's number in percent, None where it gives none."""

    name: str
    label: str
    settings: dict[str, Any]
    paper: float | None
    trainings: tuple[TrainingState, ...]
    tasks: dict[str, TaskLine]


class StudyRecord(_Record):
    """The content of `study.json`.

    Attributes:
        format: of this file.
        made: when and by what.
        name: of the study.
        title: what is studied.
        reproduces: title of the paper's table or figure; None if the paper has none.
        notes: what the paper says of it beside numbers.
        paper_task: the data set and task of the paper's numbers.
        varies: the keys in which members differ.
        base: name of the member that the others are compared with.
        dataset: what the members were trained on.
        preset: what they started from.
        split: what was answered.
        method: how.
        seeds: of every member.
        caches: where features were read, by fingerprint.
        floors: accuracy of always giving the most frequent answer, by task.
        members: in the study's order.
    """

    format: Literal["diff-lmm-study-1"] = "diff-lmm-study-1"
    made: dict[str, Any]
    name: str
    title: str
    reproduces: str | None
    notes: tuple[str, ...]
    paper_task: tuple[str, str] | None
    varies: tuple[str, ...]
    base: str
    dataset: str
    preset: str
    split: str
    method: Method
    seeds: tuple[int, ...]
    caches: dict[str, str]
    floors: dict[str, float]
    members: tuple[MemberLine, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of any member, what pools them first."""
        names = dict.fromkeys(task for member in self.members for task in member.tasks)
        return tuple(sorted(names, key=lambda task: task != ALL_TASKS))

    @property
    def trainings(self) -> tuple[TrainingState, ...]:
        """Of all members."""
        return tuple(one for member in self.members for one in member.trainings)


def read_failures(planned: Planned) -> dict[str, TrainingState]:
    """The trainings that failed in an earlier call, by the digest of their settings.

    Raises:
        UserError: the study's file is broken.
    """
    path = planned.folder / STUDY
    if not path.is_file():
        return {}
    record = parse_record(StudyRecord, read_json(path), str(path))
    return {one.digest: one for one in record.trainings if one.state == "failed"}


def write_record(planned: Planned, record: StudyRecord) -> None:
    """Replace the study's file."""
    atomic_write_text(planned.folder / STUDY, record.model_dump_json(indent=1) + "\n")


def record_of(
    planned: Planned, states: Mapping[str, TrainingState], caches: Mapping[str, str], *, scored: bool
) -> StudyRecord:
    """What is known now.

    Args:
        planned: the study.
        states: how far each training is, by digest.
        caches: root by fingerprint.
        scored: whether to read the answers of what is done; otherwise the table stays empty.
    """
    published = {table.id: table for table in published_tables()}
    mine = published.get(planned.study.reproduces or "")
    answers = {member.name: _answers(planned, member, states) if scored else {} for member in planned.members}
    config = planned.trainings[0].config
    return StudyRecord(
        made=versions(),
        name=planned.study.name,
        title=planned.study.title,
        reproduces=None if mine is None else mine.title,
        notes=() if mine is None else mine.notes,
        paper_task=None if mine is None else (mine.dataset, mine.columns[0].task or ""),
        varies=planned.study.varies,
        base=planned.study.base,
        dataset=config.data.dataset,
        preset=config.preset,
        split=SPLIT,
        method=planned.trainings[0].method,
        seeds=planned.seeds,
        caches=dict(caches),
        floors=_floors(answers),
        members=tuple(
            MemberLine(
                name=member.name,
                label=member.label,
                settings=member.settings_for(config.preset) or {},
                paper=_paper_value(member, published),
                trainings=tuple(states[one.digest] for one in planned.of(member)),
                tasks=_lines(planned, member, answers),
            )
            for member in planned.members
        ),
    )


def _answers(planned: Planned, member: Member, states: Mapping[str, TrainingState]) -> _BySeed:
    done = [one for one in planned.of(member) if states[one.digest].state == "done"]
    files = {one.seed: result_path(one.path, "predictions", SPLIT, one.method, "jsonl") for one in done}
    return {seed: pooled(read_predictions(file)) for seed, file in files.items()}


def _floors(answers: Mapping[str, _BySeed]) -> dict[str, float]:
    rows = next((of_seed for one in answers.values() for of_seed in one.values()), [])
    golds: dict[str, list[str]] = {}
    for row in rows:
        golds.setdefault(row.task, []).append(row.gold)
    floors = {task: majority_floor(given) for task, given in golds.items() if task != ALL_TASKS}
    if ALL_TASKS in golds:  # each task's own most frequent answer
        floors[ALL_TASKS] = sum(floors[task] * len(golds[task]) for task in floors) / len(golds[ALL_TASKS])
    return floors


def _lines(planned: Planned, member: Member, answers: Mapping[str, _BySeed]) -> dict[str, TaskLine]:
    mine, base = answers[member.name], answers[planned.study.base]
    top1 = _top1_by_seed(mine)
    compared = {}
    if member.name != planned.study.base and mine.keys() & base.keys():
        settings = planned.trainings[0].config.evaluate
        compared = compare_seeds(base, mine, seed=settings.resample_seed, resamples=settings.resamples)
    of_base = _top1_by_seed(base)
    return {task: _line(by_seed, of_base.get(task, {}), compared.get(task)) for task, by_seed in top1.items()}


def _line(by_seed: dict[int, float], base: dict[int, float], compared: PairedComparison | None) -> TaskLine:
    spread = over_seeds(list(by_seed.values()))
    shared = [seed for seed in by_seed if seed in base] if compared is not None else []
    better = sum(by_seed[seed] > base[seed] for seed in shared)
    return TaskLine(
        mean=spread.mean,
        std=spread.std,
        by_seed=by_seed,
        against_base=compared,
        seeds_better=better,
        seeds_compared=len(shared),
    )


def _top1_by_seed(answers: _BySeed) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for seed, rows in answers.items():
        right: dict[str, list[bool]] = {}
        for row in rows:
            right.setdefault(row.task, []).append(row.correct)
        for task, answered in right.items():
            found.setdefault(task, {})[seed] = fmean(answered)
    return found


def _paper_value(member: Member, published: Mapping[str, PublishedTable]) -> float | None:
    """The paper's number of a member, which every study takes from the task of its table's first column."""
    if member.paper is None:
        return None
    rows: Sequence[Any] = published[member.paper.table].rows
    return next(row.paper[0] for row in rows if row.label == member.paper.row)
