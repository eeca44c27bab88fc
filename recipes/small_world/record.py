"""What is kept of a run of the recipe, and how another run is held against it."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from stages.atomic import atomic_write_text
from stages.records import parse_record, read_json

PROBE_TOLERANCE = 0.1
"""How far a probe's result may lie from the record's: machines add in different orders, and training magnifies it."""


class Record(BaseModel):
    """One run of the recipe.

    Attributes:
        settings: as configured.
        probes: by features, then by what was asked of them (`recipes.small_world.measure`).
        losses: mean over each network's last steps.
        steps: of each network.
        seconds: of each network's training, of all trainings, of the probes, of all.
        versions: of the libraries.
        sizes: bytes of each folder's weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    """A line for each probe result of `one` that `other` lacks or that is further than `tolerance` from its own."""
    lines = []
    for features, scores in one.probes.items():
        for asked, score in scores.items():
            again = other.probes.get(features, {}).get(asked)
            if again is None:
                lines.append(f"{features}, {asked}: {score:.3f}, and nothing in the other record")
            elif abs(again - score) > tolerance:
                lines.append(f"{features}, {asked}: {score:.3f} and {again:.3f}")
    return lines
