"""Videos of several splits: of tasks that share videos, one's training video may be another's test video.

LVU has 204 of these (docs/data.md). A data set of one task has them where its own splits overlap.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from stages.data.manifest import Manifest
from stages.errors import UserError
from stages.wording import counted

_HELD_OUT = "test"


@dataclass(frozen=True)
class Leak:
    """The training videos of all tasks together that are in one task's test split, sorted."""

    task: str
    videos: tuple[str, ...]


def find_leaks(manifest: Manifest, tasks: Sequence[str]) -> tuple[Leak, ...]:
    """Return, for each of `tasks` that has any, its test videos that training on `tasks` together would show.

    Args:
        manifest: all splits, as `locations.manifest_of(config)` gives them.
        tasks: what is trained together; a single one has no leaks unless its own splits overlap.
    """
    trained: set[str] = set()
    tested: defaultdict[str, set[str]] = defaultdict(set)
    for sample in manifest.samples:
        if sample.task in tasks and sample.split == "train":
            trained.add(sample.video)
        elif sample.task in tasks and sample.split == _HELD_OUT:
            tested[sample.task].add(sample.video)
    shared = {task: tuple(sorted(tested[task] & trained)) for task in tasks}
    return tuple(Leak(task, videos) for task, videos in shared.items() if videos)


def refuse_leakage(manifest: Manifest, tasks: Sequence[str], *, allow: bool) -> dict[str, int]:
    """Refuse to train `tasks` together where that would show test videos, unless `allow`ed.

    Args:
        manifest: all splits of the tasks.
        tasks: what is trained together.
        allow: `data.allow_leakage`.

    Returns:
        By task, how many of its test videos training shows, for the run's stamp; empty where there are none.

    Raises:
        UserError: there are some; tasks, split and numbers of videos are named.
    """
    leaks = find_leaks(manifest, tasks)
    if leaks and not allow:
        every = {video for leak in leaks for video in leak.videos}
        named = ", ".join(f"{leak.task} {len(leak.videos)}" for leak in leaks)
        split = "give each video one split" if len(tasks) == 1 else "train one task at a time (--task)"
        together = "" if len(tasks) == 1 else f" on {len(tasks)} tasks together"
        videos = counted(len(every), "video that is", "videos that are")
        raise UserError(
            f"training{together} would show {videos} in a {_HELD_OUT} split ({named})",
            where=f"data set {manifest.dataset!r}",
            hint=f"{split}, or set data.allow_leakage=true, and the run and its report name it",
        )
    return {leak.task: len(leak.videos) for leak in leaks}


def leakage_sentence(leaks: dict[str, int]) -> str:
    """One sentence for the run's output and its report about what `refuse_leakage` returned."""
    named = ", ".join(f"{task} {count}" for task, count in leaks.items())
    return f"trained on videos that are in a {_HELD_OUT} split, by task: {named}"
