"""The study's trainings in one small file, every answer right or wrong: all that the statistics need."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.claims.plan import PlanName
from pipeline.settings.config import leaves
from stages.atomic import atomic_write_text
from stages.errors import UserError
from stages.records import parse_record, read_json


@dataclass(frozen=True)
class Answer:
    """One sample's, as `stages.evaluate.comparison` pairs them."""

    sample: str
    video: str
    task: str
    gold: str
    correct: bool


@dataclass(frozen=True)
class MemberAnswers:
    """One member: what tables call it, and of each seed answers, best validation accuracy and how distillation went."""

    label: str
    settings: Mapping[str, Any]
    answers: Mapping[int, Sequence[Answer]]
    validation_by_seed: Mapping[int, float]
    distillation_by_seed: Mapping[int, "Distillation | None"]

    @property
    def validation(self) -> float:
        """Mean over seeds of the best validation accuracy."""
        return fmean(self.validation_by_seed.values())


KD_WEIGHT = "alignment.kd_weight"
"""The setting that every member names."""
# In these the members' teachers differ.
_TEACHER = ("source", "block", "random_seed")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Record):
    """One question of the split that was answered."""

    id: str
    video: str
    task: str
    gold: str


class Distillation(_Record):
    """How a training's distillation went.

    Attributes:
        mean_gate: mean of w_i of Eq. 6 over all steps and aligned levels.
        cosine: mean of the last epoch's cosines between prediction and target (Eq. 4) over aligned levels.
        target_to_mean: the last epoch's cosine of y* to the running mean of all y*: what a constant would get.
    """

    mean_gate: float = Field(ge=0, le=1)
    cosine: float = Field(ge=-1, le=1)
    target_to_mean: float = Field(ge=-1, le=1)


class Training(_Record):
    """One training, evaluated.

    Attributes:
        member: of the study.
        seed: of the training.
        fingerprint: of the cache it learned from.
        validation: its best accuracy on the validation split, which is that of the checkpoint that answered.
        distillation: None without one.
        right: 1 or 0 for each sample, in the file's order.
    """

    member: str
    seed: int
    fingerprint: str
    validation: float = Field(ge=0, le=1)
    distillation: Distillation | None
    right: str = Field(pattern="^[01]+$")


class MemberSettings(_Record):
    """What tables call a member, and in what it differs from the preset."""

    label: str
    settings: dict[str, Any]

    @model_validator(mode="after")
    def _has_a_lambda(self) -> Self:
        if type(self.settings.get(KD_WEIGHT)) not in (int, float):
            raise ValueError(f"settings lack {KD_WEIGHT}")
        return self

    @property
    def kd_weight(self) -> float:
        """Lambda of Eq. 9."""
        return float(self.settings[KD_WEIGHT])


class Work(_Record):
    """What all trainings share; `settings` are those of the reference that can change what comes out, less the seed."""

    dataset: str
    preset: str
    train_samples: int
    settings: dict[str, Any]

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Self:
        if not set(_TEACHER) <= set(self.settings.get("teacher") or {}):
            raise ValueError(f"settings.teacher lacks one of {', '.join(_TEACHER)}")
        return self


class Trainings(_Record):
    """The content of the file; `plan` names the run of the study (`experiments.claims.plan.PLANS`)."""

    format: Literal["diff-lmm-claims-3"] = "diff-lmm-claims-3"
    plan: PlanName
    work: Work
    members: dict[str, MemberSettings]
    samples: tuple[Sample, ...]
    trainings: tuple[Training, ...]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len({sample.id for sample in self.samples}) != len(self.samples):
            raise ValueError("two samples have one id")
        seen: set[tuple[str, int]] = set()
        caches: dict[tuple[Any, ...], Training] = {}
        for one in self.trainings:
            name = f"{one.member}, seed {one.seed}"
            if one.member not in self.members:
                raise ValueError(f"{name}: there is no such member")
            if (one.distillation is None) != (self.members[one.member].kd_weight == 0):
                raise ValueError(f"{name}: has a distillation or lacks one, against its {KD_WEIGHT}")
            if (one.member, one.seed) in seen:
                raise ValueError(f"{name}: is there twice")
            seen.add((one.member, one.seed))
            if len(one.right) != len(self.samples):
                raise ValueError(f"{name}: {len(one.right)} answers to {len(self.samples)} samples")
            alike = caches.setdefault(self._teacher(one.member), one)
            if alike.fingerprint != one.fingerprint:
                raise ValueError(f"{name}: learned from another cache than {alike.member}, seed {alike.seed}")
        return self

    def _teacher(self, name: str) -> tuple[Any, ...]:
        """What decides which cache a member reads; without distillation it reads the reference's."""
        own, common = self.members[name].settings, self.work.settings["teacher"]
        return tuple(own.get(f"teacher.{key}", common[key]) for key in _TEACHER)

    def answered(self) -> dict[str, MemberAnswers]:
        """Every member that has a training."""
        return {name: self._answered(name) for name in self.members if any(self._of(name))}

    def _answered(self, name: str) -> MemberAnswers:
        member = self.members[name]
        return MemberAnswers(
            member.label,
            member.settings,
            {one.seed: self._answers(one) for one in self._of(name)},
            {one.seed: one.validation for one in self._of(name)},
            {one.seed: one.distillation for one in self._of(name)},
        )

    def _of(self, name: str) -> Iterator[Training]:
        return (one for one in self.trainings if one.member == name)

    def _answers(self, training: Training) -> list[Answer]:
        return [
            Answer(sample.id, sample.video, sample.task, sample.gold, right == "1")
            for sample, right in zip(self.samples, training.right, strict=True)
        ]


def read_trainings(path: Path) -> Trainings:
    """Read the file; UserError if it is missing, broken or contradicts itself."""
    return parse_record(Trainings, read_json(path), str(path))


def write_trainings(path: Path, trainings: Trainings) -> None:
    """Write the file, a line for each sample and training."""
    parts = [f"{json.dumps(name)}: {_text(value)}" for name, value in trainings.model_dump(mode="json").items()]
    atomic_write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
    return json.dumps(value, indent=1)


def joined(first: Trainings, second: Trainings) -> Trainings:
    """What either has, ordered by member, those of the first one before others, and seed; its labels go before, too.

    Raises:
        UserError: they are not of one study, or a training has come out in two ways.
    """
    if first.plan != second.plan:
        raise UserError("these trainings are of two runs of the study", received=second.plan, allowed=first.plan)
    if first.samples != second.samples:
        raise UserError("these trainings are not of one study: other samples were answered")
    works = [dict(leaves(part.work.model_dump(mode="json"))) for part in (first, second)]
    for key in works[0].keys() | works[1].keys():
        values = [work.get(key) for work in works]
        if values[0] != values[1]:
            raise UserError(f"these trainings are not of one study: {key}", received=values[1], allowed=str(values[0]))
    members = {**second.members, **first.members}
    for name, member in second.members.items():
        if members[name].settings != member.settings:
            raise UserError(f"{name} has other settings", received=member.settings, allowed=str(members[name].settings))
    found: dict[tuple[str, int], Training] = {}
    for one in (*first.trainings, *second.trainings):
        if found.setdefault((one.member, one.seed), one) != one:
            raise UserError(f"{one.member}, seed {one.seed}, has come out in two ways")
    names = list(dict.fromkeys([*first.members, *second.members]))
    content = {
        "plan": first.plan,
        "work": first.work,
        "members": {name: members[name] for name in names},
        "samples": first.samples,
        "trainings": sorted(found.values(), key=lambda one: (names.index(one.member), one.seed)),
    }
    return parse_record(Trainings, content, "both together")
