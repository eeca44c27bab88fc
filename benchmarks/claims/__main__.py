"""From the study's trainings to its result: a dated JSON file, the same as Markdown tables, and the plots.

    python -m benchmarks.claims RUNS_FOLDER --out benchmarks/results/claims-DATE.json --plots docs/pictures

A comparison of PLAN.md whose members were not trained is listed as not run, and counts in its family with p = 1.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.claims import plots
from benchmarks.claims.answers import Answered, read_studies
from benchmarks.claims.comparisons import Study, comparisons_of
from benchmarks.claims.curves import mean_gate
from benchmarks.claims.effects import ALL, FINE_LESS_COARSE, GROUPS
from benchmarks.claims.plan import LAMBDAS, NONE, REFERENCE, SECTIONS
from benchmarks.claims.tables import markdown
from pipeline.run_folder import RunFolder, versions
from stages.errors import UserError

STUDIES = ("claims", "claims-weighting")
SHOWN = (*GROUPS, ALL)
# What says how the models were made and asked; the others are places.
_BRANCHES = ("encoder", "teacher", "qformer", "alignment", "language", "extract", "train", "evaluate")


def accuracies(member: Answered) -> dict[str, dict[str, Any]]:
    """Right answers of one member by task and group: of each seed, their mean and sample standard deviation."""
    by_seed = {seed: _shares(member, seed) for seed in sorted(member.predictions)}
    names = next(iter(by_seed.values()))
    return {
        name: {
            "by_seed": {seed: shares[name] for seed, shares in by_seed.items()},
            "mean": statistics.fmean(shares[name] for shares in by_seed.values()),
            "std": statistics.stdev(shares[name] for shares in by_seed.values()),
        }
        for name in names
    }


def _shares(member: Answered, seed: int) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for row in member.predictions[seed]:
        right.setdefault(row.task, []).append(row.correct)
    shares = {task: statistics.fmean(rows) for task, rows in right.items()}
    groups: dict[str, tuple[str, ...]] = {**GROUPS, ALL: tuple(shares)}
    return shares | {group: statistics.fmean(shares[task] for task in tasks) for group, tasks in groups.items()}


def result_of(runs: Path, *, resamples: int, seed: int) -> tuple[Study, dict[str, Any]]:
    """Everything that the JSON file holds; UserError if a training is not done or does not fit the others."""
    members, records = read_studies(runs, STUDIES)
    study = Study(members, resamples=resamples, seed=seed)
    tests = comparisons_of(study)  # first, as it refuses runs that were not asked all tasks
    first = RunFolder.open(next(iter(members[REFERENCE].runs.values())))
    settings = first.config().model_dump(mode="json")
    del settings["train"]["seed"]  # one of several, which stand under "work"
    gates = {
        name: [mean_gate(run) for run in members[name].runs.values()]
        for name in LAMBDAS
        if name in members and name != NONE
    }
    content: dict[str, Any] = {
        "made": versions(),
        "hardware": {"cpu_cores": os.cpu_count(), "machine": platform.machine()},
        "work": {
            "dataset": records[0].dataset,
            "preset": records[0].preset,
            "seeds": list(records[0].seeds),
            "train_samples": first.stamp().get("samples", {}).get("train"),
            "test_videos": len({row.video for row in members[NONE].predictions[records[0].seeds[0]]}),
            "test_samples": len(members[NONE].predictions[records[0].seeds[0]]),
            "floors": records[0].floors,
            "bootstrap": {"resamples": resamples, "seed": seed},
        },
        "reference": {"member": REFERENCE, "settings": {branch: settings[branch] for branch in _BRANCHES}},
        "members": {line.name: {"settings": line.settings} for record in records for line in record.members},
        "tests": tests,
    }
    for name, entry in content["members"].items():
        entry |= {"label": members[name].label, "accuracy": accuracies(members[name])}
        entry["mean_gate_by_seed"] = gates.get(name)
        if name != NONE:
            entry["less_none"] = {what: asdict(one) for what, one in study.effects(NONE, name).items()}
    return study, content


def draw_plots(study: Study, folder: Path) -> list[Path]:
    """Draw the forest plot and the lambda curve of the members that there are; returns their files."""
    names = {section: [name for name in rows if name in study.members] for section, rows in SECTIONS.items()}
    sections = {
        section: [(study.members[name].label, study.effects(NONE, name)) for name in rows]
        for section, rows in names.items()
    }
    paths = [folder / "claims-forest.svg"]
    plots.write_forest(paths[0], sections, SHOWN, title="Each model less the one without distillation")
    curve = [(value, study.effects(NONE, name)) for name, value in LAMBDAS.items() if name in study.members and value]
    paths.append(folder / "claims-lambda.svg")
    plots.write_lambda(paths[1], curve)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder of runs that pipeline ablate wrote into")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the tables stand beside it as .md")
    parser.add_argument("--plots", type=Path, required=True, help="folder")
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args()
    try:
        study, content = result_of(options.runs, resamples=options.resamples, seed=options.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = options.out.with_suffix(".md")
    table.write_text(markdown(content, (*SHOWN, FINE_LESS_COARSE)), encoding="utf-8")
    print(table.read_text(encoding="utf-8"))
    for path in (options.out, table, *draw_plots(study, options.plots)):
        print(path)


if __name__ == "__main__":
    main()
