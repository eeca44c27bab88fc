"""Data set cards: one YAML file each, bundled under `data_manifests/` or the user's own."""

from dataclasses import replace
from pathlib import Path

import yaml

from stages.atomic import atomic_write_text
from stages.data.annotations import read_annotations
from stages.data.card_schema import Card, FrameRule
from stages.data.manifest import Manifest, ManifestBuilder, Sample, Split
from stages.errors import UserError
from stages.records import nearest_hint, parse_record, read_yaml
from stages.wording import counted

__all__ = ["Card", "build_manifest", "bundled_cards", "differences_from_expected", "export_manifest", "load_card"]

# The folder is beside this package both in a checkout and when installed.
_BUNDLED = Path(__file__).resolve().parents[2] / "data_manifests"


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
        videos: the folder that holds the videos, to find each one's file name extension; None: names by the pattern.

    Raises:
        UserError: a folder or every file is missing, or a file is broken; one line with file and place.
    """
    for folder, kind in ((annotations, "annotations"), (videos, "videos")):
        if folder is not None and not folder.is_dir():
            hint = f"the card {card.name!r} says under 'download' how to get it" if card.download else None
            raise UserError(f"{kind} folder not found", where=folder, hint=hint)
    if card.annotations[0].format == "manifest":
        manifest = _read_exported(card, annotations)
    else:
        builder = ManifestBuilder(card.name)
        found = read_annotations(card, annotations, videos, builder)
        if found.absent and not found.forms:
            raise UserError("file not found", where=", ".join(found.absent.values()))
        manifest = replace(builder.build(), absent_splits=found.absent, left_out=found.left_out, forms=found.forms)
    if not manifest.samples:
        what = f"the annotation files hold no samples of data set {card.name!r}"
        if manifest.left_out:
            left_out = counted(len(manifest.left_out), "video is", "videos are")
            what = f"{what}: {left_out} left out, {next(iter(manifest.left_out.values()))}"
        raise UserError(what, where=annotations)
    in_card_order = sorted(manifest.samples, key=lambda sample: list(card.tasks).index(sample.task))
    return replace(manifest, samples=tuple(in_card_order))


def _read_exported(card: Card, annotations: Path) -> Manifest:
    """Read what `pipeline data export` wrote, whose samples hold what others take from the card."""
    manifest = Manifest.read_jsonl(annotations)
    for sample in manifest.samples:
        task = card.tasks.get(sample.task)
        if task is None or task.labels != sample.candidates:
            raise UserError(
                f"sample {sample.id!r} has a task or candidates that the card {card.name!r} has not",
                where=annotations,
                received=f"task {sample.task!r} with {', '.join(sample.candidates or ('open answers',))}",
            )
    return replace(manifest, samples=tuple(_as_asked(sample, card.frame_rule) for sample in manifest.samples))


def _as_asked(sample: Sample, rule: FrameRule) -> Sample:
    """The sample without jitter or shifted, if that is asked; frames that are named one by one stay what they are."""
    jitter, offset = sample.jitter and rule.jitter, rule.frame_offset or sample.frame_offset
    if sample.times_s is not None or (jitter, offset) == (sample.jitter, sample.frame_offset):
        return sample
    return sample.model_copy(update={"jitter": jitter, "frame_offset": offset})


def export_manifest(card: Card, manifest: Manifest, folder: Path) -> Path:
    """Write a data set as plain lines and a card that reads them; return the card's path."""
    manifest.write_jsonl(folder)
    lean = card.model_dump(mode="json", exclude_defaults=True, exclude={"annotations", "download"})
    for task in lean["tasks"].values():
        task.pop("paper_prompt", None)  # the samples have their prompts already
        if "{}" not in task.get("prompt", "{}"):
            del task["prompt"]
    path = folder / f"{card.name}.yaml"
    text = yaml.safe_dump({**lean, "annotations": {"format": "manifest"}}, sort_keys=False, allow_unicode=True)
    atomic_write_text(path, text)
    return path


def differences_from_expected(card: Card, manifest: Manifest) -> tuple[str, ...]:
    """Return one line per task and split whose counts differ from the published ones; absent splits are skipped.

    Published are the card's `expected`, or, for a form of the annotations that counts its own videos, those.
    """
    lines = []
    own_counts: dict[str, dict[str, dict[Split, int]]] = {
        form.format: form.published_videos for form in card.annotations if form.published_videos
    }
    for task, by_split in card.expected.items():
        for split, expected in by_split.items():
            if split not in manifest.splits:
                continue
            samples = [sample for sample in manifest.samples if sample.task == task and sample.split == split]
            num_videos = len({sample.video for sample in samples})
            own = own_counts.get(manifest.forms.get(split, ""))
            if own is not None and num_videos != own[task][split]:
                lines.append(f"{task} {split}: {counted(num_videos, 'video')}, published {own[task][split]}")
            if own is None and (num_videos, len(samples)) != (expected.videos, expected.samples):
                lines.append(
                    f"{task} {split}: {counted(num_videos, 'video')} and {counted(len(samples), 'sample')}, "
                    f"published {expected.videos} and {expected.samples}"
                )
    return tuple(lines)
