"""The planned comparisons, made: any two members' differences, and the plan's with their corrected p."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Literal

from experiments.claims.effects import (
    FINE_LESS_COARSE,
    Draws,
    Effect,
    draw,
    effect_of,
    gains_of,
    holm,
    one_of_each_seed,
    resampled,
    without_rounding,
)
from experiments.claims.plan import BEST, HIGHEST, LAMBDAS, NONE, REFERENCE, Plan, Test, best_interior
from experiments.claims.trainings import MemberAnswers
from stages.errors import UserError

LEVEL = 0.05
"""Of the corrected p."""
Verdict = Literal["supported", "contradicted", "undecided", "not run"]


class Study:
    """All members' answers, and the differences between any two, over the same draws.

    Args:
        members: by name; `plan.NONE` and `plan.REFERENCE` are among them.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: one of those two members is missing.
    """

    def __init__(self, members: Mapping[str, MemberAnswers], *, resamples: int, seed: int) -> None:
        missing = {NONE, REFERENCE} - set(members)
        if missing:
            raise UserError(
                f"these members were not trained: {', '.join(sorted(missing))}", hint="finish the studies first"
            )
        self.members, self._resamples, self._seed = members, resamples, seed
        self._draws: Draws | None = None
        self._effects: dict[tuple[str, str], dict[str, Effect]] = {}

    def effects(self, base: str, member: str) -> dict[str, Effect]:
        """Of every task and group; UserError if the two cannot be paired."""
        key = base, member
        if key not in self._effects:
            gains = gains_of(*(self.members[name].answers for name in key))
            if self._draws is None:
                sizes = len(gains.seeds), len(gains.videos)
                self._draws = draw(*sizes, resamples=self._resamples, seed=self._seed)
            self._effects[key] = {name: effect_of(one) for name, one in resampled(gains, self._draws).items()}
        return self._effects[key]

    def by_seed(self, base: str, member: str) -> dict[str, list[float]]:
        """The differences of every task and group with each seed alone, in the seeds' order."""
        gains = gains_of(*(self.members[name].answers for name in (base, member)))
        alone = resampled(gains, one_of_each_seed(gains))
        return {name: without_rounding(one.values).tolist() for name, one in alone.items()}

    def best_lambda(self) -> str | None:
        """Name of `plan.BEST`; None if an interior lambda was not trained."""
        interior = [name for name in LAMBDAS if name not in (NONE, HIGHEST)]
        if not set(interior) <= set(self.members):
            return None
        return best_interior({name: self.members[name].validation for name in interior})


def comparisons_of(study: Study, plan: Plan) -> list[dict[str, Any]]:
    """The plan's comparisons with what they came to, Holm-corrected within their families.

    One whose members were not trained has `run` false and no result, and counts in its family with p = 1.

    Raises:
        UserError: two members cannot be paired, or were not asked all the tasks that a comparison needs.
    """
    best = study.best_lambda()
    rows = [_tested(study, test, best if test.member == BEST else test.member) for test in plan.tests]
    for family in {test.family for test in plan.tests}:
        own = [row for row in rows if row["family"] == family]
        adjusted = holm({row["name"]: row["p"] if row["run"] else 1.0 for row in own})
        for row in own:
            row["p_holm"] = adjusted[row["name"]] if row["run"] else None
            row["verdict"] = verdict_of(row, plan.dissent)
    supported = {row["name"] for row in rows if row["verdict"] == "supported"}
    for row in rows:
        row["reading"] = _reading(study, row, supported) if row["name"] in supported else None
    return rows


def verdict_of(row: Mapping[str, Any], dissent: int) -> Verdict:
    """What the plan says of a comparison: interval and corrected p must agree, and all seeds but `dissent` of them."""
    if not row["run"]:
        return "not run"
    (low, high), seeds = row["ci95"], row["by_seed"]
    if row["p_holm"] < LEVEL and low > 0 and sum(one <= 0 for one in seeds) <= dissent:
        return "supported"
    if row["p_holm"] < LEVEL and high < 0 and sum(one >= 0 for one in seeds) <= dissent:
        return "contradicted"
    return "undecided"


def _reading(study: Study, row: Mapping[str, Any], supported: Collection[str]) -> str | None:
    """How the plan words a supported claim that lacks what it takes to be put as it stands; None if it does not."""
    if row["after"] and row["after"] not in supported:
        return f"is better, not helps more: {row['after']} is not supported"
    if row["statistic"] == FINE_LESS_COARSE and study.effects(row["base"], row["member"])["fine"].ci95[0] <= 0:
        return "harms fine tasks less: they are not shown to gain"
    return None


def _tested(study: Study, test: Test, member: str | None) -> dict[str, Any]:
    row = {**asdict(test), "member": member, "run": {test.base, member} <= set(study.members)}
    if row["run"]:
        effects = study.effects(test.base, str(member))
        if test.statistic not in effects:
            raise UserError(f"{test.name} needs the tasks of {test.statistic}", received=sorted(effects))
        row |= asdict(effects[test.statistic])
        row["by_seed"] = study.by_seed(test.base, str(member))[test.statistic]
    return row
