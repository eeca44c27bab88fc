"""What training, evaluation and prediction share: the cache that fits, the samples that are in it, the model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from model.config import LanguageConfig
from pipeline.runs.run_folder import CONFIG, RunFolder
from pipeline.screen.console import say
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig, resolve, resolve_run
from stages.atomic import atomic_write_text
from stages.cache.feature_cache import FeatureCache
from stages.config import RunConfig
from stages.data.card_schema import Card
from stages.data.manifest import Sample
from stages.errors import UserError
from stages.networks.checkpoint import Checkpoints
from stages.networks.exported import About, is_export, open_export
from stages.networks.memory_law import ClipShape
from stages.networks.pretrained import LoadedModel
from stages.networks.tokens import Tokenizers
from stages.weights.instructblip import instructblip_config
from stages.weights.repository import LoadingReport, Repository, open_tensors
from stages.wording import counted

LOADING = "loading.json"
# As many answers as fit on the line that warns of them.
_MOST_NAMED = 3


def build_for_training(config: PipelineConfig, cache: FeatureCache, sample: Sample) -> LoadedModel:
    """Build the model as training starts it; widths are read off one cached frame.

    What was taken from which checkpoint is printed.

    Raises:
        UserError: the networks do not fit each other, the cache or the sample.
    """
    require_room(config, len(sample.frame_times_s()))
    frame = cache.read(sample.video, sample.frame_times_s()[:1], tolerance_s=config.cache.tolerance_s)
    assert frame.features is not None
    assert frame.targets is not None
    card = locations.card_of(config)
    words, sequence = Tokenizers.load(config).longest([sample.prompt_text], [sample.answer])
    queries = instructblip_config(Repository(config.qformer.source)).num_query_tokens
    loaded = LoadedModel.start(
        about_of(config, card),
        visual_width=frame.features.shape[2],
        target_width=frame.targets.shape[1],
        seed=config.train.seed,
        shard_language=config.train.shard_language == "fsdp",
        clip=ClipShape(len(sample.frame_times_s()), frame.features.shape[1], words, queries + sequence),
    )
    for report in loaded.loading:
        say(report.summary())
    tasks = card.tasks.values() if config.data.task == "all" else [card.tasks[config.data.task]]
    warn_of_long_answers(loaded.tokenizers, [label for task in tasks for label in task.labels or ()], config.language)
    return loaded


def about_of(config: PipelineConfig, card: Card) -> About:
    """What a model needs beside its parameters, from a run's configuration."""
    return About.of(config, card, config.data.task, config.train.precision)


def write_loading(run: Path, reports: Sequence[LoadingReport]) -> None:
    """Write down what a new run starts from."""
    atomic_write_text(run / LOADING, json.dumps([asdict(report) for report in reports], indent=1) + "\n")


def warn_of_long_answers(tokenizers: Tokenizers, answers: Sequence[str], config: LanguageConfig) -> None:
    """Name the right answers that beam search can never give whole."""
    long = tokenizers.longer_than(answers, config.max_new_tokens)
    if long:
        named = ", ".join(f"{answer!r} ({tokens})" for answer, tokens in list(long.items())[:_MOST_NAMED])
        more = f" and {len(long) - _MOST_NAMED} more" if len(long) > _MOST_NAMED else ""
        say(
            f"warning: these answers have more tokens than language.max_new_tokens={config.max_new_tokens} "
            f"and cannot be generated whole: {named}{more}"
        )


def warn_of_long_questions(tokenizers: Tokenizers, asked: Sequence[tuple[str, str]]) -> None:
    """Say how many of these questions, each with its template, lose their beginning.

    Raises:
        UserError: a template is too long by itself.
    """
    for template in {template for _, template in asked}:
        tokenizers.fitted("", template)
    cut = tokenizers.num_too_long([template.replace("{}", question) for question, template in asked])
    if cut:
        say(
            f"warning: {cut} of {len(asked)} questions are too long for qformer.max_text_tokens="
            f"{tokenizers.max_question} or language.max_prompt_tokens={tokenizers.max_prompt} and lose their beginning"
        )


def require_room(config: PipelineConfig, num_frames: int) -> None:
    """UserError if a clip has more frames than the Q-Former's temporal table has rows."""
    if num_frames > config.qformer.max_frames:
        raise UserError(
            f"a clip of this data set has {counted(num_frames, 'frame')}",
            where="qformer.max_frames",
            received=config.qformer.max_frames,
            allowed=f"{num_frames} or more",
        )


@dataclass(frozen=True)
class Finished:
    """A trained model that is not loaded yet.

    Attributes:
        config: all settings.
        about: its networks and data set.
        load: from C of the features to the model.
    """

    config: PipelineConfig
    about: About
    load: Callable[[int], LoadedModel]


def is_exported(source: str) -> bool:
    """Whether the model is an exported folder, or one of the hub: then no folder of that name's owner is here."""
    path = Path(source)
    if path.is_dir():
        return is_export(path) and not (path / CONFIG).is_file()
    # runs/NAME is a run, also where there are no runs yet.
    is_local = path.is_absolute() or path.exists() or path.parent.exists() or path.parent == Path(RunConfig().folder)
    return not is_local and source.count("/") == 1


def open_run(path: Path, overrides: Sequence[str]) -> Finished:
    """Open a run, whose best checkpoint is the model; UserError if the folder is no run."""
    folder = RunFolder.open(path)
    config = resolve_run(path / CONFIG, overrides)
    about = about_of(config, locations.card_of(config))
    return Finished(config, about, lambda width: load_trained(folder, config, visual_width=width))


def open_exported(source: str, overrides: Sequence[str]) -> Finished:
    """Open an exported model by folder or hub id; what it does not say has its default.

    Raises:
        UserError: there is none, or its frozen networks are not where it says, or are not those.
    """
    export = open_export(source)
    about = export.record.description
    options = {f"{branch}.{name}": value for branch, part in about.networks for name, value in part}
    given = {**options, "data.task": about.task, "train.precision": about.precision}
    config = resolve(options=given, overrides=overrides).config
    about = About.of(config, about.card, about.task, config.train.precision)

    def load(width: int) -> LoadedModel:
        export.require_encoder(config.encoder)
        export.require_language(config.language)
        return LoadedModel.finished(about, open_tensors(export.weights), visual_width=width, where=source)

    return Finished(config, about, load)


def load_trained(run: RunFolder, config: PipelineConfig, *, visual_width: int) -> LoadedModel:
    """Build the model of a run and load its best checkpoint, without alignment heads.

    Raises:
        UserError: the run has no checkpoint, or it does not fit the configuration.
    """
    checkpoints = Checkpoints(run.path)
    best = checkpoints.best()
    about = about_of(config, locations.card_of(config))
    where = checkpoints.folder / best
    return LoadedModel.finished(about, checkpoints.model(best), visual_width=visual_width, where=where)
