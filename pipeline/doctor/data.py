"""The doctor's checks of the data set and of its feature cache."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.doctor.findings import Finding
from pipeline.screen.console import progress_bar
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.cache.feature_cache import FeatureCache
from stages.cache.ledger import LedgerStatus
from stages.cache.source import damaged_sentence, find_changes, outdated_sentence
from stages.data.annotations import files_present
from stages.data.card_schema import Card
from stages.data.cards import build_manifest, differences_from_expected
from stages.data.frame_plan import plan_frames
from stages.data.manifest import SPLITS, Manifest
from stages.data.video_paths import join_video_path
from stages.decode.alike import named_alike
from stages.decode.lengths import read_lengths
from stages.errors import UserError
from stages.urls import is_url
from stages.wording import counted, first_names

# A file this much shorter than annotated is another one, or a part of it; less is rounding.
_SHORTER_BY_S = 1.0


def check_data(config: PipelineConfig, *, quick: bool) -> Iterator[Finding]:
    """Compare what the card and its annotations name with what is on disk, for every task.

    Args:
        quick: whether the videos' headers, from which their lengths are read, stay unread.
    """
    card = locations.card_of(config)
    annotations, videos = locations.annotations_folder(config), locations.videos_folder(config)
    yield Finding("data", "data set", "ok", f"{card.name}: {card.title}")
    yield from _check_annotations(card, annotations)
    if videos is None:
        where = f"at {locations.videos_root(config)}, not looked at; extraction fetches each while it decodes it"
        yield Finding("data", "videos", "ok", where)
    elif not videos.is_dir():
        fix = _how_to_get(card, "video", videos)
        yield Finding("data", "videos", "missing", f"no folder {videos}", fix)
    if _has_any(card, annotations):
        there = videos is not None and videos.is_dir()
        manifest = locations.manifest_of(config, with_videos=there)
        yield _count_samples(config, card, manifest)
        if manifest.left_out:
            yield _left_out(manifest)
        if there and videos is not None:
            yield from _check_videos(config, card, manifest, videos, quick=quick)


def _check_annotations(card: Card, folder: Path) -> Iterator[Finding]:
    fix = _how_to_get(card, "annotation", folder)
    if not folder.is_dir():
        yield Finding("data", "annotations", "missing", f"no folder {folder}", fix)
        return
    whole = [folder / name for name in card.annotations[0].whole]
    if whole:
        yield _file_finding("annotations", [path for path in whole if path.is_file()], whole, fix)
        return
    for split in SPLITS:
        forms = [form for form in card.annotations if split in form.files]
        if forms:
            read = next((form for form in forms if files_present(card, form, split, folder)), forms[0])
            wanted = [folder / name for name in read.files_of(split, tuple(card.tasks))]
            yield _file_finding(f"annotations {split}", files_present(card, read, split, folder), wanted, fix)


def _has_any(card: Card, folder: Path) -> bool:
    """Whether there is anything to make samples of."""
    whole = card.annotations[0].whole
    if whole:
        return all((folder / name).is_file() for name in whole)
    return any(files_present(card, form, split, folder) for form in card.annotations for split in form.files)


def _file_finding(item: str, present: Sequence[Path], wanted: Sequence[Path], fix: str) -> Finding:
    absent = tuple(str(path) for path in wanted if path not in present)
    if absent:
        return Finding("data", item, "missing", f"no file {first_names(absent)}", fix, absent)
    return Finding("data", item, "ok", first_names([str(path) for path in present]))


def _how_to_get(card: Card, kind: str, folder: Path) -> str:
    wanted = f"put the {kind} files into {folder}, or set data.{kind.removesuffix('s')}s to their folder."
    return " ".join([wanted, *card.download.split()])


def _count_samples(config: PipelineConfig, card: Card, manifest: Manifest) -> Finding:
    """Compare the counts of the configured task with the published ones."""
    if config.data.task != "all":
        expected = {task: counts for task, counts in card.expected.items() if task == config.data.task}
        card = card.model_copy(update={"expected": expected})
    different = differences_from_expected(card, manifest)
    if different:
        fix = "get the published annotation files; with these, results cannot be compared with published ones"
        return Finding("data", "samples", "problem", first_names(different, "; "), fix, different, needed=False)
    counts = [f"{sum(sample.split == split for sample in manifest.samples)} {split}" for split in manifest.splits]
    return Finding("data", "samples", "ok", f"{', '.join(counts)} about {counted(len(manifest.videos), 'video')}")


def _left_out(manifest: Manifest) -> Finding:
    names = tuple(sorted(manifest.left_out))
    reasons = ", ".join(dict.fromkeys(manifest.left_out.values()))
    fix = "add them to the table of durations; without it they have no samples"
    detail = f"{counted(len(names), 'video')}, {reasons}: {first_names(names)}"
    return Finding("data", "left out", "problem", detail, fix, names, needed=False)


def _check_videos(
    config: PipelineConfig, card: Card, manifest: Manifest, folder: Path, *, quick: bool
) -> Iterator[Finding]:
    local = {video.id: folder / video.path for video in manifest.videos.values() if "://" not in video.path}
    gone = {name: path for name, path in local.items() if not path.is_file()}
    alike = named_alike(gone.values())
    beside = {name: f" ({alike[path]} is there)" for name, path in gone.items() if path in alike}
    missing = tuple(manifest.videos[name].path + beside.get(name, "") for name in gone)
    remote = len(manifest.videos) - len(local)
    elsewhere = f", {remote} more are addresses and not looked at" if remote else ""
    found = f"{len(local) - len(missing)} of {len(local)} are in {folder}{elsewhere}"
    if missing:
        fix = f"{_how_to_get(card, 'video', folder)} Without them, extraction counts these videos as failed."
        counts = Counter(sample.split for sample in manifest.samples if sample.video in gone)
        samples = ", ".join(counted(count, f"{split} sample") for split, count in counts.items())
        detail = f"{found}; missing {len(missing)}, with {samples}: {first_names(missing)}"
        yield Finding("data", "videos", "missing", detail, fix, missing)
    else:
        yield Finding("data", "videos", "ok", found)
    yield from _check_extra_files(config, card, manifest, folder, any_missing=bool(missing))
    present = {name: path for name, path in local.items() if path.is_file()}
    if present and not quick:
        yield _check_durations(card, manifest, present)


def _check_extra_files(
    config: PipelineConfig, card: Card, manifest: Manifest, folder: Path, *, any_missing: bool
) -> Iterator[Finding]:
    """Files of the folder that no annotation of any task names."""
    annotations = locations.annotations_folder(config)
    if config.data.task != "all":
        manifest = build_manifest(card, annotations=annotations, videos=folder)
    known = {str(folder / video.path) for video in manifest.videos.values()}
    known |= {str(folder / card.videos.path_of(name, folder)) for name in manifest.left_out}
    # os.walk is several times faster than Path.rglob, and these are thousands of files.
    paths = (Path(where) / name for where, _, names in os.walk(folder) for name in names if name[0] != ".")
    unknown = [path for path in paths if str(path) not in known]
    # Annotations may be in the same folder; there, only a video is one too many.
    extra = tuple(
        sorted(
            str(path.relative_to(folder))
            for path in unknown
            if path.suffix.lower() in card.videos.extensions or not path.is_relative_to(annotations)
        )
    )
    if not extra:
        return
    detail = f"{len(extra)} that no annotation names: {first_names(extra)}"
    if any_missing:
        command = ["pipeline", "data", "prepare", "--dataset", config.data.dataset, "--from", str(folder)]
        if (annotations.name, folder.name) == ("annotations", "videos") and annotations.parent == folder.parent:
            command += ["--to", str(folder.parent)]
        elif annotations.resolve() != (Path("data") / card.name / "annotations").resolve():
            command += ["--from", str(annotations)]  # it looks for them among the downloads
        fix = f"if these are missing videos under other names, `{shlex.join(command)}` links them under the right ones"
        yield Finding("data", "extra files", "problem", detail, fix, extra, needed=False)
    else:
        yield Finding("data", "extra files", "ok", detail, names=extra)


def _check_durations(card: Card, manifest: Manifest, present: Mapping[str, Path]) -> Finding:
    """Compare what the files' headers state with the annotated durations."""
    wrong = []
    with progress_bar("lengths", len(present), "file") as bar:
        for name, length in read_lengths(present):
            annotated_s = manifest.videos[name].duration_s
            if isinstance(length, str):
                wrong.append(f"{name} ({length})")
            elif not annotated_s - _SHORTER_BY_S <= length <= annotated_s + card.videos.longer_by_s:
                wrong.append(f"{name} ({length:.1f} s, annotated {annotated_s:g} s)")
            bar.advance()
    if not wrong:
        return Finding(
            "data", "durations", "ok", f"{counted(len(present), 'file is', 'files are')} as long as annotated"
        )
    fix = (
        "get these files again; frames beyond a file's end cannot be extracted, and a longer file may be another video"
    )
    detail = f"{len(wrong)} of {counted(len(present), 'file')} of another length: {first_names(wrong)}"
    return Finding("data", "durations", "problem", detail, fix, tuple(wrong))


def check_cache(config: PipelineConfig, *, quick: bool = False) -> Iterator[Finding]:
    """Whether the cache fits the configuration, which videos it has, and what to run next.

    Args:
        quick: whether no video file is read for a digest that was recorded.
    """
    root, extract = locations.cache_root(config), locations.extract_command(config)
    try:
        there = FeatureCache.is_at(root)
    except UserError as error:
        yield Finding("cache", "cache", "problem", str(error), "set cache.root to a directory, or mend this")
        return
    if not there:
        yield Finding("cache", "cache", "missing", f"none at {root}", f"run `{extract}`", needed=False)
        return
    cache = FeatureCache.open(root)
    yield _check_fingerprint(config, cache)
    videos = locations.videos_folder(config)
    there = videos is not None and videos.is_dir()
    try:
        manifest = locations.manifest_of(config, with_videos=there)
    except UserError:
        # The data section has reported what is wrong; what is cached can be counted all the same.
        info = cache.info()
        frames = counted(info.num_frames, "frame")
        detail = f"{info.num_videos} with {frames}; without annotations, nobody knows which are missing"
        yield Finding("cache", "videos", "ok", detail)
        return
    status = cache.ledger.status(plan_frames(manifest).times_s)
    if there and status.sources:
        yield _check_sources(config, manifest, status, extract, quick=quick)
    if status.remarks:
        yield _damaged_files(manifest, status, extract)
    yield from _check_ledger(status, extract)


def _check_fingerprint(config: PipelineConfig, cache: FeatureCache) -> Finding:
    # torch is behind this module; whoever has no cache yet need not wait for it.
    from stages.frozen.identity import feature_fields
    from stages.frozen.same_weights import require_same_weights

    distils = config.alignment.kd_weight > 0
    try:
        cache.fingerprint.require_match(feature_fields(config, with_teacher=distils), cache.root)
        require_same_weights(config, cache.fingerprint, cache.root, with_teacher=distils)
    except UserError as error:
        fix = "set cache.root to another folder, or choose the preset that this cache was made with"
        return Finding("cache", "fingerprint", "problem", str(error), fix)
    return Finding("cache", "fingerprint", "ok", f"{cache.root} fits the configuration")


def _check_sources(
    config: PipelineConfig, manifest: Manifest, status: LedgerStatus, extract: str, *, quick: bool
) -> Finding:
    """Compare the videos' files with those that the cached frames are from."""
    root, protocols = locations.videos_root(config), config.extract.protocols
    # As with the videos themselves, addresses are not looked at.
    local = {video: source for video, source in status.sources.items() if not is_url(manifest.videos[video].path)}
    with progress_bar("compare", len(local), "file") as bar:
        changes = find_changes(
            local,
            lambda video: join_video_path(root, manifest.videos[video].path, protocols, video=video),
            digests="none" if quick else "in doubt",
            on_video=bar.advance,
        )
    if changes.outdated:
        fix = f"run `{extract} --refresh-changed`, or put the old files back"
        return Finding(
            "cache", "video files", "problem", outdated_sentence(changes), fix, changes.outdated, needed=False
        )
    return Finding("cache", "video files", "ok", f"{changes.compared} are those that the cached frames are from")


def _damaged_files(manifest: Manifest, status: LedgerStatus, extract: str) -> Finding:
    """Which files are damaged and what that costs."""
    found, names = damaged_sentence(status.remarks), tuple(status.remarks)
    lost = [one for one in manifest.samples if status.is_beyond_damage(one.video, one.planned_times_s())]
    if not lost:
        return Finding("cache", "damaged files", "ok", found, names=names)
    fix = f"get these files again and run `{extract} --refresh-changed`; training leaves those samples out"
    behind = f"samples that ask for frames behind the damage: {len(lost)}"
    return Finding("cache", "damaged files", "problem", f"{found}; {behind}", fix, names, needed=False)


def _check_ledger(status: LedgerStatus, extract: str) -> Iterator[Finding]:
    planned = len(status.done) + len(status.failed) + len(status.pending)
    counts = f"{len(status.done)} of {planned} done, {len(status.failed)} failed, {len(status.pending)} pending"
    if status.damaged:
        damaged = [f"{video}: {reason}" for video, reason in sorted(status.damaged.items())]
        yield Finding("cache", "commits", "problem", f"damaged: {first_names(damaged, '; ')}", f"run `{extract}` again")
    if status.pending:
        yield Finding("cache", "videos", "missing", counts, f"run `{extract}`", needed=False)
        return
    if status.failed:
        reasons = [f"{video}: {failure.reason}" for video, failure in sorted(status.failed.items())]
        fix = f"run `{extract} --retry-failed` when the cause is mended; training leaves these videos out"
        yield Finding("cache", "videos", "problem", f"{counts}; {first_names(reasons, '; ')}", fix)
    else:
        yield Finding("cache", "videos", "ok", counts)
    if status.done:
        yield Finding("cache", "next", "ok", f"pipeline train{extract.removeprefix('pipeline extract')}")
