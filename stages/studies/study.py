"""What a study is, as its YAML file says it, and the statistics over seeds: pure functions, no file but that one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stages.errors import UserError
from stages.evaluate.comparison import PairedComparison, compare
from stages.evaluate.scoring import Prediction
from stages.ids import check_id
from stages.records import nearest_hint, parse_record, read_yaml

ALL_TASKS = "all tasks"
"""Name of what pools the samples of several tasks."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PaperCell(_Part):
    """A row of one of the paper's tables (`pipeline/reporting/paper_tables.yaml`)."""

    table: str
    row: str


class Member(_Part):
    """One model of a study.

    Attributes:
        name: unique in the study; part of the names of its runs.
        title: what tables and plots call it; None means its name.
        settings: dotted keys and what they are in this member.
        presets: settings in place of those, for presets that need other ones; None leaves the member out there.
        paper: where the paper has its number.
    """

    name: str
    title: str | None = None
    settings: dict[str, Any] = Field(min_length=1)
    presets: dict[str, dict[str, Any] | None] = Field(default={})
    paper: PaperCell | None = None

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        return self.title or self.name

    def settings_for(self, preset: str) -> dict[str, Any] | None:
        """Its settings with a preset; None if the member is left out there."""
        return self.presets.get(preset, self.settings)


class Study(_Part):
    """A named set of overrides of one base configuration.

    Attributes:
        name: part of the names of its runs.
        title: what is studied.
        reproduces: id of the paper's table or figure; None if the paper has none.
        varies: every key that members set, and no other.
        base: name of the member that the others are compared with.
        members: the models, in the order of the table.
    """

    name: str
    title: str
    reproduces: str | None
    varies: tuple[str, ...] = Field(min_length=1)
    base: str
    members: tuple[Member, ...]


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        UserError: what is wrong with it, with the file and the place in it.
    """
    study = parse_record(Study, read_yaml(path), str(path))
    check_id(study.name, kind="study name", where=str(path))
    if len(study.members) < 2:
        raise UserError("a study needs two members or more", where=path, received=len(study.members))
    for index, member in enumerate(study.members):
        check_id(member.name, kind="member name", where=f"{path}: members.{index}")
    names = [member.name for member in study.members]
    for name in names:
        if names.count(name) > 1:
            raise UserError("two members have the same name", where=path, received=name)
    if study.base not in names:
        raise UserError(
            "base is no member",
            where=path,
            received=study.base,
            allowed=", ".join(names),
            hint=nearest_hint(study.base, names),
        )
    _require_named_keys(study, path)
    return study


def _require_named_keys(study: Study, path: Path) -> None:
    """UserError unless `varies` names exactly the keys that the members set."""
    changed: set[str] = set()
    for member in study.members:
        for settings in (member.settings, *member.presets.values()):
            keys = set(settings or ())
            for key in sorted(keys - set(study.varies)):
                raise UserError(
                    f"member {member.name!r} sets {key}, which the study does not say it varies",
                    where=path,
                    allowed=", ".join(study.varies),
                    hint=nearest_hint(key, study.varies) or f"add {key} to varies, or take it out of the member",
                )
            changed |= keys
    for key in study.varies:
        if key not in changed:
            raise UserError(f"no member sets {key}", where=f"{path}: varies", hint=nearest_hint(key, changed))


@dataclass(frozen=True)
class OverSeeds:
    """One figure over several seeds; `std` is the sample standard deviation, None for a single seed."""

    mean: float
    std: float | None


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean and spread; at least one value."""
    return OverSeeds(fmean(values), stdev(values) if len(values) > 1 else None)


def pooled(rows: Sequence[Prediction]) -> list[Prediction]:
    """The same answers as those of one task, and under their own tasks; only the latter if there is but one."""
    if len({row.task for row in rows}) < 2:
        return list(rows)
    return [*rows, *(replace(row, task=ALL_TASKS, sample=f"{row.sample} {ALL_TASKS}") for row in rows)]


def compare_seeds(
    base: Mapping[int, Sequence[Prediction]],
    other: Mapping[int, Sequence[Prediction]],
    *,
    seed: int,
    resamples: int,
) -> dict[str, PairedComparison]:
    """Compare two members task by task over the seeds that both have, all seeds pooled.

    Each pair is of one sample and one seed. The bootstrap draws videos, each with all its samples and seeds, so that
    the interval does not take seeds for new data; McNemar's test takes every pair to be independent, and is too sure.

    Args:
        base: predictions of the base by seed.
        other: those of the other member.
        seed: of the bootstrap.
        resamples: how often videos are drawn.

    Raises:
        UserError: they answered different samples.
    """
    shared = [number for number in base if number in other]
    # A sample has one answer of each seed, so its seed belongs to its name.
    first, second = (
        [replace(row, sample=f"{row.sample} seed {number}") for number in shared for row in one[number]]
        for one in (base, other)
    )
    return compare(first, second, seed=seed, resamples=resamples)
