"""Where a run's inputs and outputs are, given its configuration: the one place that knows the default folders."""

import shlex
from pathlib import Path

from pipeline.settings.config import KIND, PipelineConfig, resolve, settings_of
from stages.cache.files.places import Place, place_of
from stages.data.card_schema import Card
from stages.data.cards import build_manifest, load_card
from stages.data.manifest import Manifest
from stages.data.video_paths import videos_root as named_root
from stages.errors import UserError
from stages.ids import check_id
from stages.records import nearest_hint


def card_of(config: PipelineConfig) -> Card:
    """The data set's card, with prompts and frames as the configuration asks for them."""
    data = config.data
    return load_card(data.dataset).as_asked(prompts=data.prompts, jitter=data.jitter, frame_offset=data.frame_offset)


def videos_root(config: PipelineConfig) -> Path | str:
    """Folder of the videos, or the URL below which they are."""
    return named_root(config.data.videos or Path("data") / card_of(config).name / "videos")


def videos_folder(config: PipelineConfig) -> Path | None:
    """Folder of the videos; None where they are below a URL."""
    root = videos_root(config)
    return root if isinstance(root, Path) else None


def annotations_folder(config: PipelineConfig) -> Path:
    """Folder of the annotation files."""
    return Path(config.data.annotations or Path("data") / card_of(config).name / "annotations")


def cache_root(config: PipelineConfig) -> Place:
    """Directory or URL of the feature cache; by default named after data set and networks, so that presets share it."""
    if config.cache.root is not None:
        return place_of(config.cache.root)
    networks = (Path(source.rpartition(":")[2]).name for source in (config.encoder.source, config.teacher.source))
    return Path("caches") / "-".join((card_of(config).name, *networks))


def run_folder(config: PipelineConfig) -> Path:
    """Folder of the run."""
    name = config.run.name or f"{card_of(config).name}-{config.data.task}-{config.preset}"
    return Path(config.run.folder) / check_id(name, kind="run name", where="run.name")


def extract_command(config: PipelineConfig) -> str:
    """The command that fills the run's cache, to be shown when frames are missing; it goes into a shell as it is."""
    given = {
        "--dataset": config.data.dataset,
        "--preset": config.preset,
        "--task": None if config.data.task == "all" else config.data.task,
        "--videos": config.data.videos,
        "--annotations": config.data.annotations,
        "--cache": config.cache.root,
    }
    options = [(option, value) for option, value in given.items() if value]
    settings = [("--set", f"{key}={_as_yaml(value)}") for key, value in _own_settings(config)]
    return shlex.join(["pipeline", "extract", *(part for pair in [*options, *settings] for part in pair)])


def _as_yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _own_settings(config: PipelineConfig) -> list[tuple[str, object]]:
    """What extraction depends on and the run's preset does not set."""
    mine, named = settings_of(config), {"data.dataset": config.data.dataset}
    usual = settings_of(resolve(preset=config.preset, options=named).config)
    if mine[KIND] != usual[KIND]:
        # With this kind the preset sets nothing of the teacher.
        usual = {**settings_of(resolve(preset=config.preset, options={**named, KIND: mine[KIND]}).config), KIND: None}
    branches = ("data.jitter", "data.frame_offset", "encoder.", "teacher.", "extract.")
    return [(key, value) for key, value in mine.items() if key.startswith(branches) and value != usual[key]]


def manifest_of(config: PipelineConfig, splits: list[str] | None = None, *, with_videos: bool = False) -> Manifest:
    """The samples of the configured task in the given splits (None: all).

    Args:
        with_videos: whether the videos' folder is needed and looked at; at a URL names go by the card's pattern.

    Raises:
        UserError: annotations or videos are missing or broken, the task or a split is unknown.
    """
    card = card_of(config)
    tasks = tasks_of(config, card)
    manifest = build_manifest(
        card, annotations=annotations_folder(config), videos=videos_folder(config) if with_videos else None
    )
    return manifest.select(tasks=tasks, splits=splits)


def tasks_of(config: PipelineConfig, card: Card) -> list[str] | None:
    """The task that is named, None for all; UserError if the card has none of that name."""
    tasks = None if config.data.task == "all" else [config.data.task]
    unknown = [task for task in tasks or () if task not in card.tasks]
    if unknown:
        raise UserError(
            f"data set {card.name!r} has no task {unknown[0]!r}",
            where="--task",
            allowed=", ".join([*card.tasks, "all"]),
            hint=nearest_hint(unknown[0], card.tasks),
        )
    return tasks
