"""`pipeline data prepare` and `pipeline data export`: downloaded files into their places, a data set as plain lines."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.screen.console import beside_json, emit_json, print_answer, progress_bar, table
from pipeline.settings import locations
from pipeline.settings.config import Resolved
from stages.data.cards import export_manifest, load_card
from stages.data.downloads import list_downloads
from stages.data.preparation import Preparation, find_files, put_in_place, unmeasured, write_lengths
from stages.decode.lengths import read_lengths
from stages.wording import counted

# So many of each kind are named on the screen; --json has them all.
_NAMED = 10


def run_prepare(
    dataset: str, folders: Sequence[Path], target: Path | None, *, copy: bool, dry_run: bool, as_json: bool
) -> None:
    """Link a data set's files from the downloads to where its card expects them, and say what is missing.

    Raises:
        UserError: a folder is not there, no annotation file is found, or it is not clear which one is meant.
    """
    card = load_card(dataset)
    target = target or Path("data") / card.name
    plan = find_files(card, list_downloads(folders, target.resolve()), target)
    unreadable: list[str] = []
    if not dry_run:
        files = {**plan.annotations, **plan.videos}
        with progress_bar("copy" if copy else "link", len(files), "file") as bar:
            for _ in put_in_place(files, copy=copy):
                bar.advance()
        if plan.to_measure:
            waiting = unmeasured(card, target)
            with progress_bar("measure", len(waiting), "video") as bar:
                write_lengths(card, target, _measure(waiting, unreadable, bar.advance))
    if as_json:
        emit_json({"target": str(target), "dry_run": dry_run, **_as_lists(plan), "unreadable": unreadable})
    with beside_json(as_json):
        _show(plan, unreadable, dataset, target, dry_run=dry_run)


def _measure(
    videos: dict[str, Path], unreadable: list[str], advance: Callable[[], None]
) -> Iterator[tuple[str, float]]:
    for video, length in read_lengths(videos):
        advance()
        if isinstance(length, str):
            unreadable.append(f"{video} ({length})")
        else:
            yield video, length


def _as_lists(plan: Preparation) -> dict[str, object]:
    return {
        "annotations": {str(path): str(source) for path, source in plan.annotations.items()},
        "videos": {str(path): str(source) for path, source in plan.videos.items()},
        "present": plan.present,
        "missing_annotations": plan.missing_files,
        "missing_videos": plan.missing,
        "extra": plan.extra,
        "measured_from_videos": plan.to_measure,
    }


def _show(plan: Preparation, unreadable: Sequence[str], dataset: str, target: Path, *, dry_run: bool) -> None:
    new = "would be added" if dry_run else "added"
    present = {kind: sum(name.startswith(kind) for name in plan.present) for kind in ("annotations", "videos")}
    counts = [
        ("annotation files", len(plan.annotations), present["annotations"], len(plan.missing_files)),
        ("videos", len(plan.videos), present["videos"], len(plan.missing)),
    ]
    rows = [[str(cell) for cell in row] for row in counts]
    table(f"files in {target}", ("", new, "already there", "missing"), rows)
    for title, names in (
        ("missing annotation files", plan.missing_files),
        ("missing videos", plan.missing),
        ("cannot be read", unreadable),
        ("not used, because no annotation names them or they are there twice", plan.extra),
    ):
        if names:
            more = f", and {len(names) - _NAMED} more (all with --json)" if len(names) > _NAMED else ""
            print_answer(f"{title}: {', '.join(names[:_NAMED])}{more}")
    if plan.to_measure and dry_run:
        print_answer("the original release does not say how long the videos are; without --dry-run they are measured")
    if not dry_run:
        folders = ["--annotations", str(target / "annotations"), "--videos", str(target / "videos")]
        print_answer(f"next: {shlex.join(['pipeline', 'doctor', '--dataset', dataset, *folders])}")


def run_export(resolved: Resolved, folder: Path, *, as_json: bool) -> None:
    """Write a data set as this project reads it: samples and videos as JSON Lines, and a card that reads them."""
    config = resolved.config
    manifest = locations.manifest_of(config)
    card = export_manifest(locations.card_of(config), manifest, folder)
    if as_json:
        emit_json({"card": str(card), "videos": len(manifest.videos), "samples": len(manifest.samples)})
    counts = f"{counted(len(manifest.videos), 'video')} and {counted(len(manifest.samples), 'sample')}"
    with beside_json(as_json):
        print_answer(f"{counts} written to {folder}")
        print_answer(f"to use it: --dataset {card} --annotations {folder}")
