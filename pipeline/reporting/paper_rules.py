"""Which run may stand beside the paper's numbers, by the run's own record.

A run fills a cell only if it is the paper's method on the paper's data by the paper's protocol: the published networks,
the whole data set, one model for one task, the settings of the row, beam search on the test split.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from safetensors import SafetensorError, safe_open

from model.config import ModelConfig
from pipeline.reporting.departures import is_as_there
from pipeline.reporting.runs import Evaluation, RunData, cautions, published_samples
from pipeline.settings.config import PipelineConfig, resolve
from stages.errors import UserError

_BASELINE = "preset=ma-lmm-7b"
_BUNDLED = "bundled:"
# Settings of training that change speed, place or what is kept, but not what is learned beyond rounding.
_WITHOUT_EFFECT = (
    *("train.seed", "train.precision", "train.loader_workers", "train.prefetch", "train.frames_per_chunk"),
    *("train.micro_batch_size", "train.validate_every", "train.keep_checkpoints", "train.save_every_steps"),
    *("train.trackers", "train.wandb_project"),
    *("data.videos", "data.annotations"),
)
# Where the networks are read from, which may be a folder instead of the hub.
_SOURCES = {
    "encoder.source": "encoder",
    "qformer.source": "qformer",
    "language.source": "language",
    "teacher.source": "teacher",
    "teacher.vae_source": "the teacher's VAE",
}
# Parts of the trained model whose sizes are those of the published networks: Q queries of H, H by C of the encoder, the
# language model's width by H; and D of the published teacher.
_PUBLISHED_SIZES = {
    "qformer.query_tokens": (1, 32, 768),
    "qformer.qformer.encoder.layer.0.crossattention.attention.key.weight": (768, 1408),
    "language_projection.weight": (4096, 768),
}
_TARGET_WIDTH = 1152


def obstacles(run: RunData, datasets: Collection[str]) -> tuple[str, ...]:
    """Why a run may stand in none of the tables, whatever its settings; empty if it may."""
    config = run.config
    if config.data.dataset not in datasets or run.card is None:
        return (f"its data set is {config.data.dataset}, which is none of the paper's",)
    found = [*_strange_networks(run)]
    if config.data.task == "all" and len(run.card.tasks) > 1:
        found.append("one model was trained for all tasks; the paper trains one for each")
    missing = run.stamp.get("videos_missing") or []
    if missing:
        found.append(f"{len(missing)} videos failed extraction and were left out of its training")
    found += _other_samples(run)
    evaluation = run.evaluation("test", "generate")
    if evaluation is None:
        found.append("it is not evaluated on the test split by beam search")
    else:
        found += _other_protocol(run, evaluation)
    return tuple(found)


def misfits(run: RunData, dataset: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """In what a run's method differs from that of a row; empty if it is the row's."""
    if run.config.data.dataset != dataset:
        return (f"its data set is {run.config.data.dataset}",)
    expected = _expected(dataset, tuple(f"{key}={value}" for key, value in settings.items()))
    distils = expected.alignment.kd_weight > 0
    if not distils and run.config.alignment.kd_weight == 0:
        branches: tuple[str, ...] = ("encoder", "qformer")
    else:
        branches = ("encoder", "teacher", "qformer", "alignment")
    differing = [line for branch in branches for line in _differences(run.config, expected, branch)]
    return tuple(differing)


def deviations(run: RunData) -> tuple[str, ...]:
    """In what a run that fills cells departs from its row's recipe, and what could not be checked."""
    overrides = () if run.config.alignment.kd_weight > 0 else (_BASELINE,)
    expected = _expected(run.config.data.dataset, overrides)
    found = [line for branch in ("train", "data") for line in _differences(run.config, expected, branch)]
    unsure = [f"{name} was read from {given}" for name, given in _other_sources(run.config)]
    checked = "as far as the trained parameters show, of the published sizes; whether the weights are is not known"
    unlogged = [] if run.log.last is not None else ["it has no log of its training, so how long that was is not known"]
    return (*found, *cautions(run), *unlogged, *([f"{', '.join(unsure)} ({checked})"] if unsure else ()))


@lru_cache
def _expected(dataset: str, overrides: tuple[str, ...]) -> PipelineConfig:
    return resolve(options={"data.dataset": dataset}, overrides=overrides).config


def _differences(mine: PipelineConfig, theirs: PipelineConfig, branch: str) -> list[str]:
    """`key is x, not y` for each key of a branch that differs and has an effect.

    Sources are looked at elsewhere, and what does as MA-LMM or the paper is no difference.
    """
    if type(getattr(mine, branch)) is not type(getattr(theirs, branch)):
        return [f"{branch}.kind is {getattr(mine, branch).kind}, not {getattr(theirs, branch).kind}"]
    pairs = zip(getattr(mine, branch), getattr(theirs, branch), strict=True)
    skipped = (*_WITHOUT_EFFECT, *_SOURCES, "data.dataset", "data.task")
    return [
        f"{branch}.{name} is {_shown(value)}, not {_shown(other)}"
        for (name, value), (_, other) in pairs
        if value != other and f"{branch}.{name}" not in skipped and not is_as_there(f"{branch}.{name}", value)
    ]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _other_sources(config: PipelineConfig) -> list[tuple[str, str]]:
    """The networks that are not read from the published hub ids: name and source."""
    published = ModelConfig(teacher=type(config.teacher)())
    found = []
    for key, name in _SOURCES.items():
        branch, field = key.split(".")
        given = getattr(getattr(config, branch), field, None)  # not every kind of teacher has a VAE
        is_used = branch != "teacher" or config.alignment.kd_weight > 0
        if is_used and given is not None and given != getattr(getattr(published, branch), field):
            found.append((name, given))
    return found


def _strange_networks(run: RunData) -> list[str]:
    """Networks that are known not to be the published ones."""
    others = _other_sources(run.config)
    tiny = [name for name, given in others if given.startswith(_BUNDLED)]
    if tiny:
        return [f"its {', '.join(tiny)} {'is' if len(tiny) == 1 else 'are'} a bundled tiny network, not the published"]
    return _wrong_sizes(run) if others else []


def _wrong_sizes(run: RunData) -> list[str]:
    """Networks from elsewhere must at least have the published sizes, which the trained parameters show."""
    # It loads torch, which nothing else here needs.
    from stages.networks.checkpoint import Checkpoints

    checkpoints = Checkpoints(run.path)
    try:
        best = checkpoints.best()
        width = checkpoints.position(best).target_width
        with safe_open(checkpoints.folder / best / "model.safetensors", framework="numpy") as file:
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (UserError, OSError, SafetensorError):
        return ["its networks are not read from the published ids, and there is no checkpoint to see their sizes by"]
    wrong = [name for name, size in _PUBLISHED_SIZES.items() if sizes.get(name) != size]
    if run.config.alignment.kd_weight > 0 and width != _TARGET_WIDTH:
        wrong.append("teacher targets")
    return [f"its networks have other sizes than the published ones ({', '.join(wrong)})"] if wrong else []


def _other_samples(run: RunData) -> list[str]:
    """Splits of which the run did not see the published number of samples."""
    assert run.card is not None
    counts = run.stamp.get("samples") or {}
    tasks = [run.config.data.task] if run.config.data.task != "all" else list(run.card.tasks)
    found = []
    for split in ("train", "val"):
        published = sum(published_samples(run.card, task, split) for task in tasks)
        if counts.get(split) != published:
            found.append(
                f"it was trained with {counts.get(split, 'an unknown number of')} {split} samples, not {published}"
            )
    return found


def _other_protocol(run: RunData, evaluation: Evaluation) -> list[str]:
    assert run.card is not None
    expected = _expected(run.config.data.dataset, ())
    data = evaluation.record.data
    if data.dataset != run.config.data.dataset:
        return [f"its answers on the test split are to data set {data.dataset}"]
    found = []
    for task, score in evaluation.scores.items():
        published = published_samples(run.card, task, "test")
        if score.n != published:
            found.append(f"{task} was scored on {score.n} test samples, not {published}")
    settings = evaluation.record.settings
    for name, usual in expected.language.model_dump(mode="json").items():
        if name != "source" and settings["language"][name] != usual:
            found.append(f"it answered with language.{name} {settings['language'][name]}, not {usual}")
    if settings["data"]["prompts"] != run.config.data.prompts:
        found.append("it was asked in other words than it was trained with")
    if settings["data"].get("frame_offset", 0) != run.config.data.frame_offset:
        found.append("it was shown frames of other times than it was trained with")
    return found
