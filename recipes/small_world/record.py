"""What is kept of a run of the recipe, and how another run is held against it."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from stages.atomic import atomic_write_text
from stages.records import FrozenRecord, parse_record, read_json

PROBE_TOLERANCE = 0.1
"""How far a probe's result may be from the record's: machines add in different orders, and training magnifies it."""


class Record(FrozenRecord):
    """One run of the recipe.

    Attributes:
        probes: by features, then by what was asked of them (`recipes.small_world.measure`).
        losses: mean over each network's last steps.
        steps: of each network.
        seconds: of each network's training, of all trainings, of the probes, of all.
        sizes: bytes of each folder's weights.
    """

    # JSON has no NaN, and null would not be read back.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    settings: dict[str, Any]
    probes: dict[str, dict[str, float]]
    losses: dict[str, float]
    steps: dict[str, int]
    seconds: dict[str, float]
    versions: dict[str, str]
    sizes: dict[str, int]


def save_record(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    atomic_write_text(path, f"{record.model_dump_json(indent=1)}\n")


def load_record(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: it cannot be read, or is none.
    """
    return parse_record(Record, read_json(path), str(path))


def differences(one: Record, other: Record, tolerance: float) -> list[str]:
    """A line for each probe result that only one of the records has, or that differs by more than `tolerance`.

    NaN differs from everything, itself included.
    """
    mine, theirs = _by_question(one), _by_question(other)
    lines = []
    for question in dict.fromkeys([*mine, *theirs]):
        score, again, name = mine.get(question), theirs.get(question), ", ".join(question)
        if score is None:
            lines.append(f"{name}: nothing in the one record, and {again:.3f} in the other")
        elif again is None:
            lines.append(f"{name}: {score:.3f}, and nothing in the other record")
        elif not abs(again - score) <= tolerance:  # so put, NaN is within no tolerance
            lines.append(f"{name}: {score:.3f} and {again:.3f}")
    return lines


def _by_question(record: Record) -> dict[tuple[str, str], float]:
    """The probes' results by features and what was asked of them."""
    return {(features, asked): score for features, scores in record.probes.items() for asked, score in scores.items()}
