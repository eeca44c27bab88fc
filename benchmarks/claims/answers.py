"""The finished trainings of the study's members, read from a folder of runs with the project's own readers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.claims.curves import best_validation
from pipeline.results import read_predictions, result_path
from pipeline.studies.members import STUDY
from pipeline.studies.record import MemberLine, StudyRecord
from stages.errors import UserError
from stages.records import parse_record, read_json
from stages.scoring import Prediction


@dataclass(frozen=True)
class Answered:
    """One member.

    Attributes:
        label: what tables call it.
        runs: folder by seed.
        digests: of its settings by seed.
        predictions: its answers by seed.
    """

    label: str
    runs: dict[int, Path]
    digests: dict[int, str]
    predictions: dict[int, list[Prediction]]

    @property
    def validation(self) -> float:
        """Mean over seeds of the best validation accuracy; UserError if a run has none."""
        return fmean(best_validation(run) for run in self.runs.values())


def read_studies(runs: Path, names: Sequence[str]) -> tuple[dict[str, Answered], list[StudyRecord]]:
    """The members of some studies by name, and the studies' own records.

    Args:
        runs: the folder that `pipeline ablate` was given, `run.folder`.
        names: of the studies, of which those that were not begun are left out.

    Raises:
        UserError: none was begun, a training is not done, or two studies give one name to different models.
    """
    paths = [path for name in names if (path := runs / name / STUDY).is_file()]
    if not paths:
        raise UserError("none of the studies is there", where=runs, allowed=", ".join(names))
    records = [parse_record(StudyRecord, read_json(path), str(path)) for path in paths]
    members: dict[str, Answered] = {}
    for record in records:
        for line in record.members:
            found = _read(line, record, runs)
            if members.setdefault(line.name, found).digests != found.digests:
                raise UserError(f"two studies call different models {line.name!r}", where=runs)
    return members, records


def _read(line: MemberLine, record: StudyRecord, runs: Path) -> Answered:
    folders: dict[int, Path] = {}
    for one in line.trainings:
        if one.state != "done":
            raise UserError(
                f"training {line.name}, seed {one.seed}, is not done but {one.state}",
                where=runs / record.name,
                hint="call pipeline ablate again",
            )
        # Where the folder of runs is now; the record knows where it was.
        folders[one.seed] = runs / Path(one.run).parent.name / Path(one.run).name
    predictions = {
        seed: read_predictions(result_path(run, "predictions", record.split, record.method, "jsonl"))
        for seed, run in folders.items()
    }
    return Answered(line.label, folders, {one.seed: one.digest for one in line.trainings}, predictions)
