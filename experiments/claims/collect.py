"""Adds the trainings that are done in a folder of runs to the study's file, which may grow over days and machines.

python -m experiments.claims.collect RUNS_FOLDER --into experiments/claims/results/claims-trainings.json
python -m experiments.claims.collect RUNS_FOLDER --plan claims-again --into FILE
"""

import argparse
import sys
from pathlib import Path

from experiments.claims.curves import best_validation, distillation_of
from experiments.claims.plan import PLANS, REFERENCE, Plan
from experiments.claims.trainings import (
    MemberSettings,
    Sample,
    Training,
    Trainings,
    Work,
    joined,
    read_trainings,
    write_trainings,
)
from pipeline.runs.results import read_predictions, result_path
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.training import FREE
from pipeline.studies.members import STUDY
from pipeline.studies.record import StudyRecord
from stages.errors import UserError
from stages.records import parse_record, read_json

# What says how the models were made and asked. Extraction is in the fingerprint; the others are places.
_BRANCHES = ("encoder", "teacher", "qformer", "alignment", "language", "train", "evaluate")


def collect(runs: Path, plan: Plan) -> Trainings:
    """What is done of one run of the study.

    Args:
        runs: the folder that `pipeline ablate` was given, `run.folder`.
        plan: names the study files, of which those that were not begun are left out.

    Raises:
        UserError: none was begun, nothing of the reference is done, or two trainings answered other samples.
    """
    paths = [path for name in plan.studies if (path := runs / name / STUDY).is_file()]
    if not paths:
        raise UserError("none of the studies is there", where=runs, allowed=", ".join(plan.studies))
    records = [parse_record(StudyRecord, read_json(path), str(path)) for path in paths]
    parts = [_read(record, runs, plan) for record in records]
    whole = parts[0]
    for part in parts[1:]:
        whole = joined(whole, part)
    return whole


def _read(record: StudyRecord, runs: Path, plan: Plan) -> Trainings:
    done = [
        (line.name, one.seed, _folder(runs, one.run))
        for line in record.members
        for one in line.trainings
        if one.state == "done"
    ]
    reference = next((run for name, _, run in done if name == REFERENCE), None)
    if reference is None:
        raise UserError(f"no training of {REFERENCE!r} is done", where=runs / record.name)
    work = _work(record, RunFolder.open(reference))
    samples: tuple[Sample, ...] = ()
    trainings = []
    for name, seed, run in done:
        rows = read_predictions(result_path(run, "predictions", record.split, record.method, "jsonl"))
        own = tuple(Sample(id=row.sample, video=row.video, task=row.task, gold=row.gold) for row in rows)
        samples = samples or own
        if own != samples:
            raise UserError("answered other samples than the first training", where=run)
        _require_all_videos(RunFolder.open(run), work)
        trainings.append(_training(name, seed, run, "".join(str(int(row.correct)) for row in rows)))
    content = {
        "plan": plan.name,
        "work": work,
        "members": {line.name: MemberSettings(label=line.label, settings=line.settings) for line in record.members},
        "samples": samples,
        "trainings": trainings,
    }
    return parse_record(Trainings, content, str(runs / record.name))


def _require_all_videos(run: RunFolder, work: Work) -> None:
    stamp = run.stamp()
    if stamp["videos_missing"] or stamp["samples"]["train"] != work.train_samples:
        raise UserError(
            "learned from fewer videos than the study's",
            where=run.path,
            received=f"{stamp['samples']['train']} samples, {len(stamp['videos_missing'])} videos missing",
            allowed=f"{work.train_samples} samples, none missing",
        )


def _folder(runs: Path, run: str) -> Path:
    """Where a run is now; the record knows where it was."""
    return runs / Path(run).parent.name / Path(run).name


def _training(member: str, seed: int, run: Path, right: str) -> Training:
    folder = RunFolder.open(run)
    distils = folder.config().alignment.kd_weight > 0
    return Training(
        member=member,
        seed=seed,
        fingerprint=folder.stamp()["fingerprint"],
        validation=best_validation(run),
        distillation=distillation_of(run) if distils else None,
        right=right,
    )


def _work(record: StudyRecord, reference: RunFolder) -> Work:
    config = reference.config()
    settings = config.model_dump(mode="json", include=set(_BRANCHES))
    for key in ("train.seed", *FREE):
        branch, name = key.split(".")
        settings.get(branch, {}).pop(name, None)
    settings["data"] = {"prompts": config.data.prompts, "jitter": config.data.jitter, "task": config.data.task}
    samples = reference.stamp()["samples"]["train"]
    return Work(dataset=record.dataset, preset=record.preset, train_samples=samples, settings=settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder of runs that pipeline ablate wrote into")
    parser.add_argument("--into", type=Path, required=True, help="JSON file, made if it is not there")
    parser.add_argument("--plan", choices=PLANS, default="claims", help="of which run these are (PLAN.md)")
    options = parser.parse_args()
    try:
        found = collect(options.runs, PLANS[options.plan])
        if options.into.exists():
            found = joined(read_trainings(options.into), found)
        write_trainings(options.into, found)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, member in found.answered().items():
        print(f"{name:14} seeds {', '.join(map(str, sorted(member.answers)))}")
    print(f"{len(found.trainings)} trainings in {options.into}")


if __name__ == "__main__":
    main()
