"""The configuration tree of a run: defaults, card, preset, file and command line in this order, later ones winning.

A preset wins over a data set's card, so that the baseline's lambda of 0 holds on every data set; what the card has for
just this preset wins over both. Defaults live only in the settings classes of `model.config` and `stages.config`. Every
value that is not a default remembers where it came from (`Resolved.sources`).
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from model.config import TEACHERS, DiTSettings, ModelConfig, TeacherConfig
from stages.config import CacheConfig, DataConfig, EvaluateConfig, ExtractConfig, RunConfig, TrainConfig
from stages.data.cards import load_card
from stages.errors import UserError
from stages.records import nearest_hint, parse_yaml, read_yaml, text_hint
from stages.upgrade import RENAMED, upgraded

KIND = "teacher.kind"
"""The key that decides which other settings the teacher has."""
_TEACHER = "teacher."


class PipelineConfig(ModelConfig):
    """All settings of a command; the branches of the networks are inherited."""

    preset: str = "diff-lmm-7b"
    """Name of the preset that the run started from."""
    data: DataConfig = DataConfig()
    cache: CacheConfig = CacheConfig()
    extract: ExtractConfig = ExtractConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()


@dataclass(frozen=True)
class Resolved:
    """A complete configuration and where it comes from.

    Attributes:
        sources: for each dotted key that is not a default, the layer that set it.
        given: the dotted keys that the command names itself, by an option, `--set` or a file; None: all of them.
    """

    config: PipelineConfig
    sources: dict[str, str]
    given: frozenset[str] | None = None


@dataclass(frozen=True)
class Layer:
    """Values from one place, as dotted keys."""

    source: str
    values: dict[str, Any]


def preset_names() -> list[str]:
    """Names of the presets that are shipped."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("pipeline.settings.presets").iterdir()
        if entry.name.endswith(".yaml")
    )


def valid_keys(branch: type[BaseModel] = PipelineConfig, prefix: str = "") -> list[str]:
    """Every dotted key that holds a value in some tree; which of the teacher's there are depends on its kind."""
    keys = []
    for name, field in branch.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")]
        below = [key for kind in kinds for key in valid_keys(kind, f"{prefix}{name}.")]
        keys += below or [prefix + name]
    return list(dict.fromkeys(keys))


def settings_of(config: BaseModel) -> dict[str, Any]:
    """Every dotted key that this tree has, with its value."""
    return _flatten(config.model_dump())


def meaning_of(config: BaseModel, key: str) -> str:
    """What a key of this tree means."""
    *parents, leaf = key.split(".")
    description = type(reduce(getattr, parents, config)).model_fields[leaf].description
    return " ".join((description or "").split())


def setting(config: PipelineConfig, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def resolve(
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Resolved:
    """Put the layers together and check the result.

    Args:
        preset: name of a shipped preset; None means the one that `--set` or the file names, else the default.
        config_file: YAML in the tree's form, for example a run's `config.yaml`.
        options: dotted keys set by a command's own options; None values are left out.
        overrides: `key=value` strings from `--set`; the value is read as YAML.

    Raises:
        UserError: an unknown preset, key or value; the nearest valid key is named.
    """
    from_file = [] if config_file is None else [_layer_of(config_file)]
    chosen = {key: value for key, value in (options or {}).items() if value is not None}
    command = [Layer("command line", chosen), *_parse_overrides(overrides)]
    later = [*from_file, *command]
    given = {key for layer in later for key in layer.values}
    if preset is not None:
        given.add("preset")
    else:
        preset = _last("preset", later) or PipelineConfig.model_fields["preset"].default
    base = Layer(f"preset {preset}", _flatten(_read_preset(preset)))
    card = load_card(_last("data.dataset", [base, *later]) or DataConfig().dataset)
    for named in card.presets:
        _require_preset(named, where=f"card {card.name}: presets")
    both = Layer(f"card {card.name} for {base.source}", _flatten(card.presets.get(preset, {})))
    # The name comes last: it must be that of the preset whose values were taken.
    name = Layer(base.source, {"preset": preset})
    resolved = _validate([Layer(f"card {card.name}", _flatten(card.settings)), base, both, *later, name])
    return replace(resolved, given=frozenset(given))


def dump_yaml(config: PipelineConfig) -> str:
    """Return the tree as YAML, as `config_file` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def resolve_run(path: Path, overrides: Sequence[str]) -> PipelineConfig:
    """Read a run's resolved configuration and apply `--set` overrides to it."""
    stored = _layer_of(path)
    return _validate([Layer(stored.source, upgraded(stored.values)), *_parse_overrides(overrides)]).config


def overlay(config: PipelineConfig, values: Mapping[str, Any], source: str) -> PipelineConfig:
    """The same settings with some dotted keys changed; UserError names `source` and a misspelt key's nearest."""
    before = Layer("configuration", _flatten(config.model_dump(mode="json")))
    return _validate([before, Layer(source, dict(values))]).config


def load_yaml(path: Path) -> PipelineConfig:
    """Read a run's resolved configuration back; UserError if it is not one."""
    return resolve_run(path, ())


def _validate(layers: Sequence[Layer]) -> Resolved:
    known = valid_keys()
    values: dict[str, Any] = {KIND: DiTSettings().kind}
    sources: dict[str, str] = {}
    for layer in layers:
        if layer.values.get(KIND, values[KIND]) != values[KIND]:
            # Settings of a teacher of another kind are not about this one.
            values = {key: value for key, value in values.items() if not key.startswith(_TEACHER)}
            sources = {key: source for key, source in sources.items() if not key.startswith(_TEACHER)}
        for key, value in layer.values.items():
            if key not in known:
                raise _unknown_key(key, layer.source, known)
            values[key], sources[key] = value, layer.source
    usual = _flatten(PipelineConfig(teacher=_teacher_of(values[KIND], sources.get(KIND))).model_dump(mode="json"))
    for key in values:
        if key not in usual:
            of_kind = ", ".join(name for name in usual if name.startswith(_TEACHER))
            what = f"a teacher of kind {values[KIND]} does not read it"
            raise UserError(what, where=sources[key], received=key, allowed=of_kind)
    try:
        config = PipelineConfig.model_validate(_nest(values))
    except ValidationError as error:
        raise _bad_value(error, sources) from error
    actual = _flatten(config.model_dump(mode="json"))
    default = {**usual, KIND: DiTSettings().kind}
    return Resolved(config, {key: sources[key] for key in actual if actual[key] != default[key]})


def _teacher_of(kind: Any, source: str | None) -> TeacherConfig:
    """Default settings of a teacher of this kind."""
    if not isinstance(kind, str) or kind not in TEACHERS:
        allowed, hint = ", ".join(TEACHERS), nearest_hint(str(kind), TEACHERS)
        raise UserError("unknown kind of teacher", where=source, received=kind, allowed=allowed, hint=hint)
    return TEACHERS[kind]()


def _unknown_key(key: str, source: str, known: Sequence[str]) -> UserError:
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1) or [name for name in known if name.endswith(f".{leaf}")][:1]
    hint = f"did you mean {near[0]}?" if near else "`pipeline config show --all` lists every key"
    if key in RENAMED:
        hint = f"it is now {RENAMED[key]}"
    return UserError("unknown configuration key", where=source, received=key, hint=hint)


def _bad_value(error: ValidationError, sources: Mapping[str, str]) -> UserError:
    def key_of(entry: ErrorDetails) -> str:
        # The kind of teacher stands behind `teacher` there, and in no key.
        parts = [str(part) for index, part in enumerate(entry["loc"]) if (index, entry["loc"][0]) != (1, "teacher")]
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((prefix for prefix in prefixes if prefix in sources), ".".join(parts))

    first = error.errors()[0]
    key = key_of(first)
    # A value of several allowed kinds has one reason for each.
    reasons = [entry["msg"].removeprefix("Value error, ") for entry in error.errors() if key_of(entry) == key]
    where = sources.get(key, "configuration")
    what, value = f"{key}: {' or: '.join(dict.fromkeys(reasons))}", first["input"]
    return UserError(what, where=where, received=value, hint=text_hint(first["type"], value))


def _parse_overrides(texts: Sequence[str]) -> list[Layer]:
    """`--set` by `--set`; the kind of teacher comes first, in whichever order they are given."""
    return sorted(map(_parse_override, texts), key=lambda layer: KIND not in layer.values)


def _parse_override(text: str) -> Layer:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(
            "not of the form key=value", where="--set", received=text, hint="write for example train.lr=3e-4"
        )
    try:
        return Layer(f"--set {text}", {key.strip(): yaml.safe_load(value)})
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise UserError(f"the value of {key} is not valid YAML", where="--set", received=value) from error


def _require_preset(name: str, where: str | None = None) -> None:
    if name not in preset_names():
        near = difflib.get_close_matches(str(name), preset_names(), n=1)
        raise UserError(
            "unknown preset",
            where=where,
            received=name,
            allowed=", ".join(preset_names()),
            hint=f"did you mean {near[0]}?" if near else None,
        )


def _read_preset(name: str) -> dict[str, Any]:
    _require_preset(name)
    text = resources.files("pipeline.settings.presets").joinpath(f"{name}.yaml").read_text("utf-8")
    return _tree(parse_yaml(text, f"preset {name}"), f"preset {name}")


def _layer_of(path: Path) -> Layer:
    values: dict[str, Any] = {}
    for key, value in leaves(_tree(read_yaml(path), str(path))):
        if key in values:
            raise UserError(f"{key} is there twice, once written with dots", where=path, received=value)
        values[key] = value
    return Layer(str(path), values)


def _tree(content: Any, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError("the configuration must be a mapping", where=where, received=type(content).__name__)
    return content


def _last(key: str, layers: Sequence[Layer]) -> Any:
    return next((layer.values[key] for layer in reversed(layers) if key in layer.values), None)


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return dict(leaves(tree))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its dotted key; one that is written with dots and without comes twice."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree
