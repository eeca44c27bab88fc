"""Putting downloaded annotation files and videos where a card expects them, under the names it expects."""

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from stages.atomic import atomic_path, atomic_write_text
from stages.data.annotations import read_annotations
from stages.data.annotations.lengths import HEADER, read_length_table
from stages.data.annotations.msvd_release import read_video_names
from stages.data.card_schema import AnnotationFiles, Card
from stages.data.downloads import Download, DownloadReader, whole_archive
from stages.data.manifest import ManifestBuilder
from stages.errors import UserError

# `Title [id].mp4` is what yt-dlp writes, `Title-id.mp4` what youtube-dl wrote.
_ID_AT_THE_END = re.compile(r"(?:\[([\w-]{11})\]|-([\w-]{11}))$")
_DURATIONS = "durations.csv"


@dataclass
class Preparation:
    """What there is to do, and what is left: paths in the target by the download that goes there, and names.

    Attributes:
        present: files of both kinds that are there already, relative to the target.
        missing_files: annotation files that were not found; of several forms, the first's.
        missing: videos that were not found, by id.
        extra: videos of the downloads that no annotation names, or that are there twice.
        to_measure: whether a table of durations has to be made from the videos.
    """

    annotations: dict[Path, Download] = field(default_factory=dict)
    videos: dict[Path, Download] = field(default_factory=dict)
    present: list[str] = field(default_factory=list)
    missing_files: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    to_measure: bool = False


def find_files(card: Card, downloads: Sequence[Download], target: Path) -> Preparation:
    """Find out which downloads go where; nothing is written.

    Raises:
        UserError: several different files could be one annotation file, or an annotation file is broken.
    """
    plan = Preparation()
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        _find_annotations(card, downloads, target / "annotations", staged, plan)
        try:
            wanted, other_names = _wanted_videos(card, staged, plan)
        except UserError as error:
            raise UserError(_by_own_names(str(error), staged, target / "annotations", plan)) from None
    _find_videos(card, downloads, target / "videos", wanted, other_names, plan)
    return plan


def _by_own_names(message: str, staged: Path, folder: Path, plan: Preparation) -> str:
    """A message about the copies in `staged`, as one about the files that they are copies of."""
    for path, download in plan.annotations.items():
        message = message.replace(str(staged / path.relative_to(folder)), str(download))
    return message.replace(str(staged), str(folder))


# ---- annotations ----


def _find_annotations(card: Card, downloads: Sequence[Download], folder: Path, staged: Path, plan: Preparation) -> None:
    """Choose the annotation files, and lay copies of them, and of those that are in the target, into `staged`."""
    with DownloadReader() as reader:
        for form, name in _file_names(card):
            there = folder / name
            copy = staged / name
            if there.is_file():
                plan.present.append(f"annotations/{name}")
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.symlink_to(there.resolve())
                continue
            chosen = _choose(card, form, name, downloads, reader)
            if chosen is not None:
                plan.annotations[there] = chosen
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(reader.read(chosen))
    if not any(path.is_file() for path in staged.rglob("*")):
        first = [name for form, name in _file_names(card) if form is card.annotations[0]]
        raise UserError(
            f"no annotation file of data set {card.name!r} among the downloads",
            allowed=", ".join(first),
            hint="its card says under 'download' where to get them",
        )
    plan.missing_files = [
        form.files[split].replace("{task}", task)
        for form in card.annotations[:1]
        for split in form.files
        for task in dict.fromkeys(card.tasks if "{task}" in form.files[split] else [""])
        if not any((staged / name).exists() for other in card.annotations for name in other.files_of(split, [task]))
    ]


def _file_names(card: Card) -> Iterator[tuple[AnnotationFiles, str]]:
    for form in card.annotations:
        names = [name for split in form.files for name in form.files_of(split, tuple(card.tasks))]
        yield from ((form, name) for name in (*names, *form.durations, *form.whole, form.video_names) if name)


def _choose(
    card: Card, form: AnnotationFiles, name: str, downloads: Sequence[Download], reader: "DownloadReader"
) -> Download | None:
    """The download that is this annotation file, by its name, its first entry and the folder it is in."""
    parts = PurePosixPath(name).parts
    fitting = [one for one in downloads if one.name.parts[-len(parts) :] == parts]
    fitting = [one for one in fitting if _looks_right(form, name, reader.read(one))]
    own = card.name.partition("_")[0]
    in_own_folder = [one for one in fitting if any(own in part.lower() for part in (*one.path.parts, *one.name.parts))]
    fitting = in_own_folder or fitting
    if len({reader.read(one) for one in fitting}) > 1:
        raise UserError(
            f"several different files could be {name} of data set {card.name!r}",
            where=", ".join(map(str, fitting)),
            hint="leave one of them, or name its folder with --from",
        )
    return fitting[0] if fitting else None


def _looks_right(form: AnnotationFiles, name: str, content: bytes) -> bool:
    """Whether a file's first entry is of this data set, not of another with the same file name; broken files pass."""
    if form.format not in ("lvu_json", "msvd_json", "msvd_release") or not name.endswith(".json"):
        return True
    try:
        entries = json.loads(content)
    except ValueError:
        return True
    if form.format == "msvd_release":
        # MSRVTT-QA is published in the same form, with a category for each video.
        return isinstance(entries, list) and all("category_id" not in entry for entry in entries[:1])
    first: object = next(iter(entries.values()), {}) if isinstance(entries, dict) else None
    if not isinstance(first, dict):
        return False
    if form.format == "lvu_json":
        return {"duration", "num_frames"} <= first.keys()
    return first.get("dataset", "msvd") == "msvd"


# ---- videos ----


def _wanted_videos(card: Card, staged: Path, plan: Preparation) -> tuple[list[str], dict[str, str]]:
    """The ids of all annotated videos, and other names by which the downloads may call them."""
    without_table = []
    for form in card.annotations:
        if form.durations and not any((staged / name).exists() for name in form.durations):
            # Without lengths every video is left out, and so named.
            (staged / form.durations[0]).write_text(",".join(HEADER) + "\n", encoding="utf-8")
            without_table.append(form.format)
    builder = ManifestBuilder(card.name)
    found = read_annotations(card, staged, None, builder)
    names: dict[str, str] = {}
    for form in card.annotations:
        if form.format not in found.forms.values():
            continue
        if form.video_names is not None:
            names = read_video_names(staged / form.video_names)
            plan.to_measure = True
        elif form.format in without_table:
            plan.missing_files.append(" or ".join(form.durations))
    return sorted({*builder.videos, *found.left_out}), names


def _find_videos(
    card: Card,
    downloads: Sequence[Download],
    folder: Path,
    wanted: Sequence[str],
    other_names: Mapping[str, str],
    plan: Preparation,
) -> None:
    candidates: defaultdict[str, list[Download]] = defaultdict(list)
    ids = set(wanted)
    for download in downloads:
        if download.name.suffix.lower() in card.videos.extensions:
            video = _id_of(download.name.stem, ids, other_names)
            if video is None:
                plan.extra.append(str(download))
            else:
                candidates[video].append(download)
    for video in wanted:
        present = card.videos.path_of(video, folder)
        found = sorted(
            candidates[video],
            key=lambda one: (one.name.stem != video, card.videos.extensions.index(one.name.suffix.lower())),
        )
        if (folder / present).exists():
            plan.present.append(f"videos/{present}")
        elif found:
            first = found.pop(0)
            plain = card.videos.pattern.replace("{id}", video)
            suffix = first.name.suffix.lower()
            plan.videos[folder / (plain.removesuffix(Path(card.videos.pattern).suffix) + suffix)] = first
            plan.extra += map(str, found)
        else:
            plan.missing.append(video)


def _id_of(stem: str, ids: set[str], other_names: Mapping[str, str]) -> str | None:
    """The video that a file is by its name: the id itself, another name of it, or a title that ends with the id."""
    if stem in ids:
        return stem
    if other_names.get(stem) in ids:
        return other_names[stem]
    ending = _ID_AT_THE_END.search(stem)
    found = next((group for group in ending.groups() if group), None) if ending else None
    return found if found in ids else None


# ---- putting things in their places ----


def put_in_place(files: Mapping[Path, Download], *, copy: bool) -> Iterator[Path]:
    """Put each download at its path and yield it; what is there already is never touched.

    Files are hard links, symbolic links where the disk is another one, or copies (`copy`, and out of archives).
    """
    # In the archives' own order: going back in a compressed one means reading it from its start.
    with DownloadReader() as reader:
        for path, download in sorted(files.items(), key=lambda item: (str(item[1].path), item[1].position)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if copy or download.member is not None:
                _copy(path, download, reader)
            else:
                _link(path, download.path.resolve())
            yield path


def _copy(path: Path, download: Download, reader: DownloadReader) -> None:
    if path.exists():
        return
    with (
        whole_archive(download.path),
        atomic_path(path) as temporary,
        reader.open(download) as source,
        temporary.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)


def _link(path: Path, source: Path) -> None:
    try:
        os.link(source, path)
    except FileExistsError:
        return
    except OSError:  # another disk, or one without hard links
        path.symlink_to(source)


def unmeasured(card: Card, target: Path) -> dict[str, Path]:
    """Return the videos that are in the target and not yet in its table of durations, by id."""
    known = _known_lengths(target)
    folder = target / "videos"
    builder = ManifestBuilder(card.name)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        for path in (target / "annotations").iterdir():
            if path.name != _DURATIONS:
                (staged / path.name).symlink_to(path.resolve())
        (staged / _DURATIONS).write_text(",".join(HEADER) + "\n", encoding="utf-8")
        left_out = read_annotations(card, staged, None, builder).left_out
    paths = {video: folder / card.videos.path_of(video, folder) for video in sorted(left_out)}
    return {video: path for video, path in paths.items() if video not in known and path.is_file()}


def write_lengths(card: Card, target: Path, measured: Iterable[tuple[str, float]]) -> int:
    """Add measured lengths in seconds to the target's table of durations and return how many videos it has."""
    rows = _known_lengths(target)
    for video, length_s in measured:
        rows[video] = (length_s, max(1, round(length_s * card.frame_rule.index_fps)))
    lines = [f"{video},{length_s:.3f},{frames or ''}" for video, (length_s, frames) in sorted(rows.items())]
    atomic_write_text(target / "annotations" / _DURATIONS, "\n".join([",".join(HEADER), *lines]) + "\n")
    return len(rows)


def _known_lengths(target: Path) -> dict[str, tuple[float, int | None]]:
    folder = target / "annotations"
    if not (folder / _DURATIONS).is_file():
        return {}
    table = read_length_table(folder, [_DURATIONS], hint="")
    return {video: (length.duration_s, length.num_frames) for video, length in table.items()}
