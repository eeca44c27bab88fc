"""From the study's trainings to its result: a dated JSON file, the same as Markdown tables, and the plots.

    RESULTS=experiments/claims/results
    python -m experiments.claims $RESULTS/claims-trainings.json --out $RESULTS/claims-DATE.json \\
        --plots experiments/claims/pictures

A comparison of PLAN.md whose members were not trained is listed as not run, and counts in its family with p = 1.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.claims import plots
from experiments.claims.comparisons import Study, comparisons_of
from experiments.claims.curves import method_gates
from experiments.claims.effects import ALL, FINE_LESS_COARSE, GROUPS
from experiments.claims.plan import CONSTANT, LAMBDAS, NONE, PLANS, REFERENCE, Plan
from experiments.claims.tables import markdown
from experiments.claims.trainings import MemberAnswers, Trainings, read_trainings
from pipeline.runs.run_folder import versions
from stages.atomic import atomic_write_text
from stages.errors import UserError

SHOWN = (*GROUPS, ALL)
# Six digits are written into weighting.yaml.
_EQUAL_WEIGHT = 1e-4


def accuracies(member: MemberAnswers) -> dict[str, dict[str, Any]]:
    """Right answers of one member by task and group: of each seed, their mean and sample standard deviation."""
    by_seed = {seed: _shares(member, seed) for seed in sorted(member.answers)}
    names = next(iter(by_seed.values()))
    return {
        name: {
            "by_seed": {seed: shares[name] for seed, shares in by_seed.items()},
            "mean": statistics.fmean(shares[name] for shares in by_seed.values()),
            "std": statistics.stdev(shares[name] for shares in by_seed.values()),
        }
        for name in names
    }


def _shares(member: MemberAnswers, seed: int) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for row in member.answers[seed]:
        right.setdefault(row.task, []).append(row.correct)
    shares = {task: statistics.fmean(rows) for task, rows in right.items()}
    groups: dict[str, tuple[str, ...]] = {**GROUPS, ALL: tuple(shares)}
    return shares | {group: statistics.fmean(shares[task] for task in tasks) for group, tasks in groups.items()}


def result_of(trainings: Trainings, *, resamples: int, seed: int) -> tuple[Study, dict[str, Any]]:
    """Everything that the result's JSON file holds; UserError if a task or a member's seed is missing."""
    members, plan = trainings.answered(), PLANS[trainings.plan]
    _require_complete(members, trainings, plan)
    study = Study(members, resamples=resamples, seed=seed)
    content: dict[str, Any] = {
        "made": versions(),
        "work": {
            "plan": plan.name,
            **trainings.work.model_dump(mode="json"),
            "seeds": sorted(members[REFERENCE].answers),
            "test_videos": len({sample.video for sample in trainings.samples}),
            "test_samples": len(trainings.samples),
            "bootstrap": {"resamples": resamples, "seed": seed},
        },
        "tests": comparisons_of(study, plan),
        "members": {},
    }
    for name, member in members.items():
        entry: dict[str, Any] = {
            "label": member.label,
            "settings": member.settings,
            "accuracy": accuracies(member),
            "validation_by_seed": member.validation_by_seed,
            "distillation_by_seed": {
                seed: one and one.model_dump() for seed, one in member.distillation_by_seed.items()
            },
        }
        if name != NONE:
            entry["less_none"] = {what: asdict(one) for what, one in study.effects(NONE, name).items()}
        content["members"][name] = entry
    return study, content


def _require_complete(members: Mapping[str, MemberAnswers], trainings: Trainings, plan: Plan) -> None:
    missing = {task for tasks in GROUPS.values() for task in tasks} - {sample.task for sample in trainings.samples}
    if missing:
        raise UserError(f"these tasks were not asked: {', '.join(sorted(missing))}")
    for name, member in members.items():
        if sorted(member.answers) != sorted(plan.seeds):
            raise UserError(
                f"{name} was not trained with the plan's seeds",
                received=sorted(member.answers),
                allowed=str(sorted(plan.seeds)),
                hint="let the study come to its end, or take the member out of the file",
            )
    if CONSTANT in members:
        own = trainings.members[CONSTANT].kd_weight
        equal = LAMBDAS[REFERENCE] * statistics.fmean(method_gates(trainings))
        if not math.isclose(own, equal, rel_tol=_EQUAL_WEIGHT):
            raise UserError(
                f"lambda of {CONSTANT} is not the method's times its mean gate", received=own, allowed=f"{equal:.6g}"
            )


def draw_plots(study: Study, plan: Plan, folder: Path) -> list[Path]:
    """Draw the forest plot of the members that there are, and the curve if all lambdas are; returns their files."""
    names = {section: [name for name in rows if name in study.members] for section, rows in plan.sections.items()}
    sections = {
        section: [(study.members[name].label, study.effects(NONE, name)) for name in rows]
        for section, rows in names.items()
    }
    paths = [folder / f"{plan.name}-forest.svg"]
    plots.write_forest(paths[0], sections, SHOWN, title="Each model less the one without distillation")
    if set(LAMBDAS) <= set(study.members):
        paths.append(folder / f"{plan.name}-lambda.svg")
        curve = [(value, study.effects(NONE, name)) for name, value in LAMBDAS.items() if name != NONE]
        plots.write_lambda(paths[1], curve)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainings", type=Path, help="the file that experiments.claims.collect wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the tables stand beside it as .md")
    parser.add_argument("--plots", type=Path, required=True, help="folder")
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args()
    if options.out.suffix != ".json":
        parser.error(f"--out is a .json file, not {options.out}")
    try:
        trainings = read_trainings(options.trainings)
        study, content = result_of(trainings, resamples=options.resamples, seed=options.seed)
        tables = markdown(content, (*SHOWN, FINE_LESS_COARSE))
        written = [options.out, options.out.with_suffix(".md")]
        for path, text in zip(written, (json.dumps(content, indent=1) + "\n", tables), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, text)
        written += draw_plots(study, PLANS[trainings.plan], options.plots)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(tables, *written, sep="\n")


if __name__ == "__main__":
    main()
