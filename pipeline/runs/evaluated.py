"""A trained model that is to be evaluated: a run's best checkpoint or an exported model, and the data it is asked."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.runs.models import Finished, is_exported, open_exported, open_run
from pipeline.runs.results import ModelRecord
from pipeline.runs.run_folder import CONFIG, RunFolder
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.data.cards import bundled_cards
from stages.errors import UserError
from stages.files import sha256_of
from stages.networks.build import TRAINED_FILE
from stages.networks.checkpoint import Checkpoints
from stages.networks.exported import open_export

# What follows another data set unless it is named too.
_FOLDERS = ("data.videos", "data.annotations", "cache.root")


@dataclass(frozen=True)
class Evaluated:
    """A model that is opened but not loaded.

    Attributes:
        source: the run's folder, or the exported model's folder or hub id.
        finished: its settings, with the data that it is to be asked, and how to load it.
        identify: says which parameters it has; reads them, so ask when everything else is known to be well.
        folder: where its results go by default; None if nowhere: it is a model of the hub, or asked other data than
            its own.
        fingerprint: of the cache that it was trained on; None if that is not known.
        overrides: the command's own settings.
    """

    source: str
    finished: Finished
    identify: Callable[[], ModelRecord]
    folder: Path | None
    fingerprint: str | None
    overrides: tuple[str, ...]

    @property
    def config(self) -> PipelineConfig:
        """All settings."""
        return self.finished.config

    def results_folder(self, named: Path | None) -> Path:
        """Where results go.

        Raises:
            UserError: that must be named and is not, or the named folder is a file, or a run with results of its own.
        """
        if named is None and self.folder is None:
            raise UserError(
                "results on other data than the model's own, or of a model of the hub, need a folder of their own",
                where=self.source,
                hint="name one with --output",
            )
        folder = named or self.folder
        assert folder is not None
        if folder.exists() and not folder.is_dir():
            raise UserError("this is a file", where=folder, hint="give --output the name of a folder")
        if (folder / CONFIG).is_file() and (self.folder is None or folder.resolve() != self.folder.resolve()):
            raise UserError(
                "this is a run's folder, and these would stand there for the run's own results",
                where=folder,
                hint="give --output another folder",
            )
        return folder


def open_evaluated(source: str, options: Mapping[str, str | None], overrides: Sequence[str]) -> Evaluated:
    """Open a run by its folder, or an exported model by folder or hub id.

    Args:
        source: which.
        options: dotted keys of the data that the command names itself; None where it does not.
        overrides: `key=value` strings from `--set`.

    Raises:
        UserError: there is none, or a setting is wrong.
    """
    given = {key: value for key, value in options.items() if value is not None}
    own = (*overrides, *(_setting(key, value) for key, value in given.items()))
    opened = _open_exported if is_exported(source) else _open_run
    return opened(source, given, own)


def _setting(key: str, value: str | None) -> str:
    """`key=value` as `--set` takes it, whatever characters the value has."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _open_run(source: str, given: Mapping[str, str], own: tuple[str, ...]) -> Evaluated:
    folder = RunFolder.open(Path(source))
    saved = folder.config()
    moved = given.get("data.dataset", saved.data.dataset) != saved.data.dataset
    finished = open_run(folder.path, [*(_setting(key, None) for key in _FOLDERS if moved), *own])
    now = finished.config.data
    same = (now.dataset, now.task) == (saved.data.dataset, saved.data.task)
    fingerprint = folder.stamp().get("fingerprint")
    return Evaluated(
        source, finished, lambda: _identify_run(folder.path, source), folder.path if same else None, fingerprint, own
    )


def _identify_run(path: Path, source: str) -> ModelRecord:
    checkpoints = Checkpoints(path)
    best = checkpoints.best()
    position = checkpoints.position(best)
    return ModelRecord(
        source=source,
        kind="run",
        checkpoint=best,
        epoch=position.epoch,
        step=position.step,
        sha256=sha256_of(checkpoints.folder / best / TRAINED_FILE),
    )


def _open_exported(source: str, given: Mapping[str, str], own: tuple[str, ...]) -> Evaluated:
    export = open_export(source)
    about = export.record.description
    if "data.dataset" not in given and about.card.name not in bundled_cards():
        raise UserError(
            f"the model was trained on data set {about.card.name!r}, whose card is not shipped",
            where=source,
            hint="give the card's file with --dataset",
        )
    finished = open_exported(source, [_setting("data.dataset", about.card.name), *own])
    card = locations.card_of(finished.config)
    for task in about.card.tasks.keys() & card.tasks.keys():
        if about.card.tasks[task].prompt != card.tasks[task].prompt:
            raise UserError(
                f"the model was trained with another wording of task {task!r}: {about.card.tasks[task].prompt!r}",
                where=source,
                received=card.tasks[task].prompt,
                hint="choose it with --set data.prompts=paper or data.prompts=ma-lmm",
            )
    shown, now = about.card.frame_rule.frame_offset, card.frame_rule.frame_offset
    if shown != now and about.card.name == card.name:
        raise UserError(
            f"the model was trained on frames with data.frame_offset={shown}",
            where=source,
            received=now,
            hint=f"add --set data.frame_offset={shown}",
        )
    folder = Path(source)
    same = (card.name, finished.config.data.task) == (about.card.name, about.task)

    def identify() -> ModelRecord:
        return ModelRecord(source=source, kind="export", sha256=sha256_of(export.weights))

    return Evaluated(source, finished, identify, folder if folder.is_dir() and same else None, None, own)
