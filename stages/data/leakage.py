"""Videos of several splits: of tasks that share videos, one's training video may be another's test video.

LVU has 204 of these (docs/data.md). A data set of one task has them where its own splits overlap.
"""

from collections import defaultdict
from collections.abc import Sequence

from stages.data.manifest import Manifest
from stages.errors import UserError
from stages.wording import counted

_HELD_OUT = "test"


def find_leaks(manifest: Manifest, tasks: Sequence[str]) -> dict[str, set[str]]:
    """Return, for each of `tasks` that has any, its test videos that training on `tasks` together would show.

    The manifest has all splits. A single task has no leaks unless its own splits overlap.
    """
    trained: set[str] = set()
    tested: defaultdict[str, set[str]] = defaultdict(set)
    for sample in manifest.samples:
        if sample.task in tasks and sample.split == "train":
            trained.add(sample.video)
        elif sample.task in tasks and sample.split == _HELD_OUT:
            tested[sample.task].add(sample.video)
    return {task: shared for task in tasks if (shared := tested[task] & trained)}


def refuse_leakage(manifest: Manifest, tasks: Sequence[str], *, allow: bool) -> dict[str, int]:
    """Refuse to train `tasks` together where that would show test videos, unless `allow`ed.

    Returns:
        By task, how many of its test videos training shows, for the run's stamp; empty where there are none.

    Raises:
        UserError: there are some; tasks, split and numbers of videos are named.
    """
    leaks = find_leaks(manifest, tasks)
    if leaks and not allow:
        every = set().union(*leaks.values())
        named = ", ".join(f"{task} {len(videos)}" for task, videos in leaks.items())
        split = "give each video one split" if len(tasks) == 1 else "train one task at a time (--task)"
        together = "" if len(tasks) == 1 else f" on {len(tasks)} tasks together"
        videos = counted(len(every), "video that is", "videos that are")
        raise UserError(
            f"training{together} would show {videos} in a {_HELD_OUT} split ({named})",
            where=f"data set {manifest.dataset!r}",
            hint=f"{split}, or set data.allow_leakage=true, and the run and its report name it",
        )
    return {task: len(videos) for task, videos in leaks.items()}


def leakage_sentence(leaks: dict[str, int]) -> str:
    """One sentence for the run's output and its report about what `refuse_leakage` returned."""
    named = ", ".join(f"{task} {count}" for task, count in leaks.items())
    return f"trained on videos that are in a {_HELD_OUT} split, by task: {named}"
