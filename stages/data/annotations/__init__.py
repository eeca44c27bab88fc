"""Readers of public annotation files: each form has a module, which turns it into questions about videos."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from stages.data.annotations import jsonl, lvu_csv, lvu_json, msvd_json, msvd_release
from stages.data.annotations.questions import Question, Source
from stages.data.card_schema import AnnotationFiles, Card
from stages.data.manifest import SPLITS, ManifestBuilder, Split

_READERS: Mapping[str, Callable[[Source, AnnotationFiles, Path, Split], Iterator[Question]]] = MappingProxyType(
    {
        "lvu_json": lvu_json.questions,
        "lvu_csv": lvu_csv.questions,
        "msvd_json": msvd_json.questions,
        "msvd_release": msvd_release.questions,
    }
)


@dataclass(frozen=True)
class Found:
    """What was found of a card's annotations.

    Attributes:
        forms: by split, the form that was read.
        absent: by split, the file that was looked for in vain.
        left_out: by video, why it has no samples.
    """

    forms: dict[str, str]
    absent: dict[str, str]
    left_out: dict[str, str]


def read_annotations(card: Card, annotations: Path, videos: Path | None, builder: ManifestBuilder) -> Found:
    """Read into `builder`, for each split, the first form of `card`'s annotations that has a file in the folder.

    Raises:
        UserError: one line with file and place for whatever is wrong.
    """
    source = Source(card, videos, builder)
    found = Found({}, {}, source.left_out)
    if card.annotations[0].file is not None:
        source.add(jsonl.questions(source, annotations / card.annotations[0].file))
        return found
    for split in SPLITS:
        forms = [form for form in card.annotations if split in form.files]
        form = next((form for form in forms if files_present(card, form, split, annotations)), None)
        if form is not None:
            found.forms[split] = form.format
            source.add(_READERS[form.format](source, form, annotations, split))
        elif forms:
            found.absent[split] = str(annotations / forms[0].files_of(split, tuple(card.tasks))[0])
    return found


def files_present(card: Card, form: AnnotationFiles, split: Split, annotations: Path) -> list[Path]:
    """Return those of a form's files for a split that are in the folder."""
    paths = [annotations / name for name in form.files_of(split, tuple(card.tasks))]
    return [path for path in paths if path.exists()]
