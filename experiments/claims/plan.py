"""The comparisons that PLAN.md names for either run, so that nothing is chosen after their results are seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from experiments.claims.effects import ALL, FINE_LESS_COARSE

NONE = "none"
"""The model without distillation."""
REFERENCE = "lambda-0.1"
"""The method as the preset has it; every claim but that of lambda is put to the test with its lambda."""
CONSTANT = "constant"
"""The method with constant weights, at equal effective weight of the distillation."""
LAMBDAS = {NONE: 0.0, "lambda-0.03": 0.03, "lambda-0.1": 0.1, "lambda-0.3": 0.3, "lambda-1": 1.0, "lambda-3": 3.0}
"""Members that differ in lambda alone, ascending."""
HIGHEST = "lambda-3"
"""Their last; those between it and NONE are interior."""
BEST = "best lambda"
"""The interior member with the best mean validation accuracy."""

Family = Literal["primary", "secondary"]
PlanName = Literal["claims", "claims-again"]


@dataclass(frozen=True)
class Test:
    """One comparison.

    Attributes:
        name: in PLAN.md.
        claim: what a positive difference says.
        base: a member.
        member: another one, whose answers less those of `base` are meant.
        statistic: a task, a group, ALL or FINE_LESS_COARSE.
        family: it is corrected in.
        after: name of a test; without its support, this one says "is better than" and not "helps more than".
    """

    __test__ = False  # no test of pytest's

    name: str
    claim: str
    base: str
    member: str
    statistic: str
    family: Family
    after: str | None = None


@dataclass(frozen=True)
class Plan:
    """One run of the study.

    Attributes:
        name: of its files and pictures.
        studies: names of the study files that train its members.
        seeds: of every member's trainings.
        sections: members by what they differ in, as the forest plot shows them; the method beside each of its rivals.
        tests: the planned comparisons, corrected within their families.
        dissent: as many seeds may point the other way before a claim is undecided.
    """

    name: PlanName
    studies: tuple[str, ...]
    seeds: tuple[int, ...]
    sections: Mapping[str, tuple[str, ...]]
    tests: tuple[Test, ...]
    dissent: int


_FIRST = (
    Test("H1", "distillation helps", NONE, REFERENCE, ALL, "primary"),
    Test("H2", "it helps fine tasks more than coarse ones", NONE, REFERENCE, FINE_LESS_COARSE, "primary"),
    Test("H6a", "its own targets help more than shuffled ones", "shuffled", REFERENCE, ALL, "primary", after="H1"),
    Test("H6b", "the trained DiT helps more than an untrained one", "untrained", REFERENCE, ALL, "primary", after="H1"),
    Test("H6c", "the trained DiT helps more than the vision tower", "tower", REFERENCE, ALL, "primary", after="H1"),
    Test("H3a", "the best interior lambda is better than 0", NONE, BEST, ALL, "secondary"),
    Test("H3b", "the best interior lambda is better than the highest", HIGHEST, BEST, ALL, "secondary"),
    Test("H4a", "higher levels are better than the lower ones", "levels-lower", REFERENCE, ALL, "secondary"),
    Test("H4b", "higher levels are better than the last one", "levels-last", REFERENCE, ALL, "secondary"),
    Test("H4c", "higher levels are better than all of them", "levels-all", REFERENCE, ALL, "secondary"),
    Test("H5", "adaptive weights are better than constant ones", CONSTANT, REFERENCE, ALL, "secondary"),
    Test("H6d", "control, must not be: shuffled targets help", NONE, "shuffled", ALL, "secondary"),
)
_AGAIN = (
    Test("R1", "distillation helps", NONE, REFERENCE, ALL, "primary"),
    Test("R2", "it helps with lambda 1", NONE, "lambda-1", ALL, "primary"),
    Test(
        "R3", "with lambda 1 it helps fine tasks more than coarse ones", NONE, "lambda-1", FINE_LESS_COARSE, "primary"
    ),
    Test(
        "R4",
        "lambda 1: its own targets help more than shuffled ones",
        "shuffled-1",
        "lambda-1",
        ALL,
        "primary",
        after="R2",
    ),
)
PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "claims",
            ("claims", "claims-weighting"),
            tuple(range(5)),
            {
                "lambda": ("lambda-0.03", "lambda-0.1", "lambda-0.3", "lambda-1", "lambda-3"),
                "levels": ("levels-all", "levels-last", "levels-lower", REFERENCE),
                "weights": (REFERENCE, CONSTANT),
                "teacher": ("block-2", "block-4", "block-6", REFERENCE, "untrained", "tower"),
                "targets": (REFERENCE, "shuffled", "centred"),
            },
            _FIRST,
            dissent=0,
        ),
        Plan(
            "claims-again",
            ("claims-again",),
            tuple(range(10, 18)),
            {"lambda": (REFERENCE, "lambda-1"), "targets": ("lambda-1", "shuffled-1")},
            _AGAIN,
            dissent=1,
        ),
    )
}
"""The first run, and the second one on other videos and seeds."""


def best_interior(validation: Mapping[str, float]) -> str:
    """The interior member of LAMBDAS with the best validation accuracy, of equals the smallest lambda.

    Args:
        validation: mean over seeds of the accuracy on the validation split, by member; all interior ones.
    """
    return max((name for name in LAMBDAS if name not in (NONE, HIGHEST)), key=lambda name: validation[name])
