"""Data set cards: one YAML file each, bundled under `data_manifests/` or the user's own."""

from dataclasses import replace
from pathlib import Path

from stages.annotations import read_annotations
from stages.card_schema import Card
from stages.errors import UserError
from stages.manifest import Manifest, ManifestBuilder
from stages.records import nearest_hint, parse_record, read_yaml

__all__ = ["Card", "build_manifest", "bundled_cards", "differences_from_expected", "load_card"]

# The folder lies beside this package both in a checkout and when installed.
_BUNDLED = Path(__file__).resolve().parents[1] / "data_manifests"


def bundled_cards() -> tuple[str, ...]:
    """Return the names of the cards that come with the project, sorted."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.yaml")))


def load_card(name_or_path: str | Path) -> Card:
    """Return the bundled card of this name, or the card in this `.yaml` file.

    Raises:
        UserError: no such card, or its file is broken; one line with file and key.
    """
    name = str(name_or_path)
    if name in bundled_cards():
        path = _BUNDLED / f"{name}.yaml"
    elif Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
    else:
        raise UserError(
            "unknown data set",
            received=name,
            allowed=f"{', '.join(bundled_cards())}, or the path of a .yaml card",
            hint=nearest_hint(name, bundled_cards()),
        )
    return parse_record(Card, read_yaml(path), str(path))


def build_manifest(card: Card, *, annotations: Path, videos: Path | None) -> Manifest:
    """Turn a card's annotation files into a manifest.

    A split whose file is absent is left out; asking `Manifest.select` for it names the file.

    Args:
        card: which files there are and how they are read.
        annotations: the folder that holds them.
        videos: the folder that holds the videos, to find each one's file name extension; None: names by pattern alone.

    Raises:
        UserError: a folder or every file is missing, or a file is broken; one line with file and place.
    """
    for folder, kind in ((annotations, "annotations"), (videos, "videos")):
        if folder is not None and not folder.is_dir():
            hint = f"the card {card.name!r} says under 'download' how to get it" if card.download else None
            raise UserError(f"{kind} folder not found", where=folder, hint=hint)
    builder = ManifestBuilder(card.name)
    absent = read_annotations(card, annotations, videos, builder)
    manifest = builder.build(absent)
    if absent and len(absent) == len(card.annotations.files):
        raise UserError("file not found", where=", ".join(absent.values()))
    if not manifest.samples:
        raise UserError(f"the annotation files hold no samples of data set {card.name!r}", where=annotations)
    in_card_order = sorted(manifest.samples, key=lambda sample: list(card.tasks).index(sample.task))
    return replace(manifest, samples=tuple(in_card_order))


def differences_from_expected(card: Card, manifest: Manifest) -> tuple[str, ...]:
    """Return one line per task and split whose counts differ from the card's; splits without samples are skipped."""
    lines = []
    for task, by_split in card.expected.items():
        for split, expected in by_split.items():
            samples = [sample for sample in manifest.samples if sample.task == task and sample.split == split]
            found = (len({sample.video for sample in samples}), len(samples))
            if split in manifest.splits and found != (expected.videos, expected.samples):
                lines.append(
                    f"{task} {split}: {found[0]} videos and {found[1]} samples, "
                    f"published {expected.videos} and {expected.samples}"
                )
    return tuple(lines)
