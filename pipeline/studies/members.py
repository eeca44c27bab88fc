"""From a study and a base configuration to trainings: their settings, run folders, and what is done of them already."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.reporting.paper import published_tables
from pipeline.runs.results import EvaluationRecord, result_path
from pipeline.runs.run_folder import CONFIG
from pipeline.runs.training import FREE
from pipeline.settings import locations
from pipeline.settings.config import KIND, PipelineConfig, Resolved, load_yaml, overlay, preset_names, settings_of
from stages.errors import UserError
from stages.evaluate.answering import methods_of
from stages.evaluate.scoring import Method
from stages.files import sha256_of
from stages.networks.build import TRAINED_FILE
from stages.networks.checkpoint import Checkpoints
from stages.records import nearest_hint
from stages.studies.study import Member, Study, read_study

SPLIT = "test"
"""The split that studies are scored on."""
STUDY = "study.json"
"""What is known of a study, in its folder."""
_SUFFIXES = (".yaml", ".yml")
_PLACES = ("run.folder", "run.name")
_OF_THE_COMMAND = ("preset", "data.dataset", "data.task", "data.videos", "data.annotations")
_DIGEST_CHARS = 16
_CACHE_CHARS = 8


@dataclass(frozen=True)
class Training:
    """One member with one seed: one ordinary run.

    Attributes:
        member: which.
        seed: `train.seed`.
        config: all settings, with the run's folder and cache.
        digest: of everything in them that what is learned depends on.
    """

    member: Member
    seed: int
    config: PipelineConfig
    digest: str

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return locations.run_folder(self.config)

    @property
    def method(self) -> Method:
        """How it is answered, and of two ways the one that the study's tables show."""
        return methods_of(self.config.evaluate)[0]


@dataclass(frozen=True)
class Planned:
    """A study with its trainings; a training of an earlier study may be among them."""

    study: Study
    members: tuple[Member, ...]
    seeds: tuple[int, ...]
    folder: Path
    trainings: tuple[Training, ...]

    def of(self, member: Member) -> list[Training]:
        """The trainings of one member, by seed."""
        return [one for one in self.trainings if one.member == member]


def shipped_studies() -> list[str]:
    """Names of the studies that are shipped."""
    entries = resources.files("pipeline.studies").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_study(name: str) -> tuple[Study, str]:
    """A shipped study by name, or one's own by its file; and where it was read from.

    Raises:
        UserError: there is none, or its file is wrong.
    """
    if name.endswith(_SUFFIXES):
        return read_study(Path(name)), name
    if name not in shipped_studies():
        raise UserError(
            "unknown study",
            where="--study",
            received=name,
            allowed=f"{', '.join(shipped_studies())}, or the path of a .yaml file",
            hint=nearest_hint(name, shipped_studies()),
        )
    with resources.as_file(resources.files("pipeline.studies").joinpath(f"{name}.yaml")) as path:
        return read_study(path), f"study {name}"


def plan_study(name: str, base: Resolved, num_seeds: int) -> Planned:
    """Resolve every member with every seed, and find what was trained before.

    Args:
        name: of a shipped study, or a file.
        base: the configuration that members change; its `train.seed` is the first seed.
        num_seeds: how many.

    Raises:
        UserError: a member is wrong or equal to another, the study varies what the command sets, or a folder holds
            another run.
    """
    study, source = load_study(name)
    _require_variable(study, source)
    _require_known(study, source)
    members = tuple(member for member in study.members if member.settings_for(base.config.preset) is not None)
    _require_base(study, members, base.config.preset, source)
    _require_ours(study, members, base)
    configs = {one.name: _member_config(study, one, base.config, source) for one in members}
    _require_different(configs, source)
    seeds = tuple(range(base.config.train.seed, base.config.train.seed + num_seeds))
    folder = Path(base.config.run.folder) / study.name
    known = _earlier_runs(Path(base.config.run.folder))
    trainings = tuple(
        _training(member, seed, configs[member.name], folder, known) for member in members for seed in seeds
    )
    return Planned(study, members, seeds, folder, trainings)


def _require_variable(study: Study, source: str) -> None:
    """UserError if it varies what is not a member's to say, or makes no other model."""
    for key in study.varies:
        why = "--seeds sets how many there are" if key == "train.seed" else "it changes nothing that is learned"
        if key in _OF_THE_COMMAND:
            why = "members are compared on the same samples, from the same preset; give it to the command"
        if key in ("train.seed", *_OF_THE_COMMAND, *_PLACES, *FREE):
            raise UserError(f"a study cannot vary {key}: {why}", where=f"{source}: varies")


def _require_known(study: Study, source: str) -> None:
    """UserError for presets and rows of the paper that do not exist."""
    tables = {table.id: [row.label for row in table.rows] for table in published_tables()}
    named = [("reproduces", study.reproduces, list(tables))]
    for member in study.members:
        where = f"members.{member.name}"
        named += [(f"{where}.presets", preset, preset_names()) for preset in member.presets]
        if member.paper is not None:
            named.append((f"{where}.paper.table", member.paper.table, list(tables)))
            named.append((f"{where}.paper.row", member.paper.row, tables.get(member.paper.table, [])))
    for key, value, allowed in named:
        if value is not None and value not in allowed:
            raise UserError(
                "there is no such name",
                where=f"{source}: {key}",
                received=value,
                allowed=", ".join(allowed),
                hint=nearest_hint(value, allowed),
            )


def _require_base(study: Study, members: Sequence[Member], preset: str, source: str) -> None:
    if study.base not in [member.name for member in members]:
        raise UserError(f"its base {study.base!r} is left out with preset {preset}", where=source)
    if len(members) < 2:
        raise UserError(f"all members but its base are left out with preset {preset}", where=source)


def _require_ours(study: Study, members: Sequence[Member], base: Resolved) -> None:
    """UserError if the command sets a key that every member sets anyway."""
    for key in study.varies:
        setter = base.sources.get(key, "")
        if setter.startswith("--set") and all(key in (one.settings_for(base.config.preset) or {}) for one in members):
            raise UserError(f"every member of study {study.name} sets {key} itself", where=setter, hint="leave it out")


def _member_config(study: Study, member: Member, base: PipelineConfig, source: str) -> PipelineConfig:
    settings = member.settings_for(base.preset)
    assert settings is not None
    config = overlay(base, settings, f"{source}: member {member.name}")
    changed = [key for key, _was, _now in differences(base, config) if key not in study.varies]
    # Another kind of teacher has other settings, and other defaults of the same.
    assert all(key.startswith("teacher.") and KIND in settings for key in changed), f"{member.name} changes {changed}"
    return config if _features(config) == _features(base) else _with_own_cache(config, base)


def _features(config: PipelineConfig) -> dict[str, Any]:
    """The settings that cached features depend on."""
    return {branch: getattr(config, branch).model_dump(mode="json") for branch in ("encoder", "teacher", "extract")}


def _with_own_cache(config: PipelineConfig, base: PipelineConfig) -> PipelineConfig:
    """With a cache beside the base's, named after what its features are made with."""
    suffix = _digest(_features(config))[:_CACHE_CHARS]
    return overlay(config, {"cache.root": f"{locations.cache_root(base)}-{suffix}"}, "study")


def _require_different(configs: Mapping[str, PipelineConfig], source: str) -> None:
    seen: dict[str, str] = {}
    for name, config in configs.items():
        twin = seen.setdefault(digest_of(config), name)
        if twin != name:
            raise UserError(f"members {twin!r} and {name!r} have the same settings", where=source)


def _training(member: Member, seed: int, config: PipelineConfig, folder: Path, known: Mapping[str, Path]) -> Training:
    name = f"{member.name}-seed{seed}"
    here = {"train.seed": seed, "run.folder": str(folder), "run.name": name}
    config = overlay(config, here, "study")
    digest = digest_of(config)
    if (folder / name / CONFIG).is_file():
        _require_same(folder / name, config)
    elif digest in known:
        # `train --resume` wants the folder and name that the run was begun with.
        config = config.model_copy(update={"run": load_yaml(known[digest] / CONFIG).run})
    return Training(member, seed, config, digest)


def _require_same(path: Path, config: PipelineConfig) -> None:
    saved = load_yaml(path / CONFIG)
    for key, was, now in differences(saved, config):
        if _is_learned(key):
            raise UserError(
                f"a run of another configuration has this name: {key} is {was!r} there",
                where=path,
                received=now,
                hint="give the options of the first call, or another folder with --set run.folder=DIR",
            )


def _earlier_runs(folder: Path) -> dict[str, Path]:
    """The runs of earlier studies by the digest of their settings."""
    found: dict[str, Path] = {}
    for study in sorted(folder.glob(f"*/{STUDY}")):
        for path in sorted(study.parent.glob(f"*/{CONFIG}")):
            try:
                config = load_yaml(path)
            except UserError:
                continue  # of another version, with other keys: no run of these settings
            if locations.run_folder(config).resolve() == path.parent.resolve():
                found.setdefault(digest_of(config), path.parent)
    return found


def digest_of(config: PipelineConfig) -> str:
    """Digest of every setting that what is learned and scored depends on: equal ones need one training."""
    return _digest({key: value for key, value in settings_of(config).items() if _is_learned(key)})


def _is_learned(key: str) -> bool:
    return key not in FREE and key not in _PLACES


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:_DIGEST_CHARS]


def differences(before: PipelineConfig, after: PipelineConfig) -> list[tuple[str, Any, Any]]:
    """The dotted keys in which two configurations differ, with the values of both; None where one has no such key."""
    was, now = settings_of(before), settings_of(after)
    keys = dict.fromkeys([*was, *now])
    return [
        (key, was.get(key), now.get(key)) for key in keys if (key in was, was.get(key)) != (key in now, now.get(key))
    ]


def is_trained(one: Training) -> bool:
    """Whether its training has come to its end."""
    checkpoints = Checkpoints(one.path)
    last = checkpoints.last()
    if last is None:
        return False
    position, recipe = checkpoints.position(last), one.config.train
    return position.epoch >= recipe.epochs or (recipe.patience is not None and position.stale >= recipe.patience)


def is_evaluated(one: Training) -> bool:
    """Whether the answers in its folder are those of its best checkpoint, asked with its settings."""
    checkpoints = Checkpoints(one.path)
    model = sha256_of(checkpoints.folder / checkpoints.best() / TRAINED_FILE)
    card, task = locations.card_of(one.config), one.config.data.task
    ranked = any(part.labels for name, part in card.tasks.items() if task in (name, "all"))
    return all(_is_answered(one, method, model) for method in methods_of(one.config.evaluate, candidates=ranked))


def _is_answered(one: Training, method: Method, model: str) -> bool:
    if not result_path(one.path, "metrics", SPLIT, method, "json").is_file():
        return False
    try:
        record = result_path(one.path, "evaluation", SPLIT, method, "json").read_bytes()
        found = EvaluationRecord.model_validate_json(record)
    except (OSError, ValidationError):
        return False
    asked = {branch: getattr(one.config, branch).model_dump(mode="json") for branch in ("evaluate", "language")}
    return found.model.sha256 == model and all(
        _binding(branch, found.settings.get(branch, {})) == _binding(branch, asked[branch]) for branch in asked
    )


def _binding(branch: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a branch's settings that answers depend on."""
    return {key: value for key, value in settings.items() if f"{branch}.{key}" not in FREE}


def is_finished(one: Training) -> bool:
    """Whether nothing is left to do for it; anything damaged is left to the training, which knows how to go on."""
    try:
        return is_trained(one) and is_evaluated(one)
    except (UserError, OSError):
        return False
