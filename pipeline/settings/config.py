"""The configuration tree of a run: defaults, card, preset, file and command line in this order, later ones winning.

A preset wins over a data set's card, so that the baseline's lambda of 0 holds on every data set; what the card says for
this preset alone wins over both. Defaults live in the
settings classes of `model.config` and `stages.config` alone. Every value that is not a default
remembers where it came from (`Resolved.sources`).
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from model.config import ModelConfig
from stages.config import CacheConfig, DataConfig, EvaluateConfig, ExtractConfig, RunConfig, TrainConfig
from stages.data.cards import load_card
from stages.errors import UserError
from stages.records import parse_yaml, read_yaml, text_hint

RENAMED = {"train.workers": "train.loader_workers", "train.frames_per_run": "train.frames_per_chunk"}
"""Keys of earlier versions and their names of today: read in a stored run, refused where a person gives them."""


class PipelineConfig(ModelConfig):
    """Everything that a command may be told; the branches of the networks are inherited."""

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
        config: all of it.
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


def valid_keys(branch: type[BaseModel] = PipelineConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree that holds a value."""
    for name, field in branch.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from valid_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


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
    command = [Layer("command line", chosen), *(_parse_override(text) for text in overrides)]
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
    """Read a run's resolved configuration, of this or an earlier version, and apply `--set` overrides to it."""
    stored = _layer_of(path)
    saved = Layer(stored.source, {RENAMED.get(key, key): value for key, value in stored.values.items()})
    return _validate([saved, *map(_parse_override, overrides)]).config


def overlay(config: PipelineConfig, values: Mapping[str, Any], source: str) -> PipelineConfig:
    """The same settings with some dotted keys changed; UserError names `source` and a misspelt key's nearest."""
    before = Layer("configuration", _flatten(config.model_dump(mode="json")))
    return _validate([before, Layer(source, dict(values))]).config


def load_yaml(path: Path) -> PipelineConfig:
    """Read a run's resolved configuration back; UserError if it is not one."""
    return resolve_run(path, ())


def _validate(layers: Sequence[Layer]) -> Resolved:
    known = list(valid_keys())
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.values.items():
            if key not in known:
                raise _unknown_key(key, layer.source, known)
            values[key], sources[key] = value, layer.source
    try:
        config = PipelineConfig.model_validate(_nest(values))
    except ValidationError as error:
        raise _bad_value(error, sources) from error
    default = _flatten(PipelineConfig().model_dump(mode="json"))
    actual = _flatten(config.model_dump(mode="json"))
    return Resolved(config, {key: sources[key] for key in actual if actual[key] != default[key]})


def _unknown_key(key: str, source: str, known: Sequence[str]) -> UserError:
    if key in RENAMED:
        return UserError("a setting has another name now", where=source, received=key, hint=f"write {RENAMED[key]}")
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1) or [name for name in known if name.endswith(f".{leaf}")][:1]
    hint = f"did you mean {near[0]}?" if near else "`pipeline config show --all` lists every key"
    return UserError("unknown configuration key", where=source, received=key, hint=hint)


def _bad_value(error: ValidationError, sources: Mapping[str, str]) -> UserError:
    def key_of(entry: ErrorDetails) -> str:
        parts = [str(part) for part in entry["loc"]]
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((prefix for prefix in prefixes if prefix in sources), ".".join(parts))

    first = error.errors()[0]
    key = key_of(first)
    # A value of several allowed kinds has one reason for each.
    reasons = [entry["msg"].removeprefix("Value error, ") for entry in error.errors() if key_of(entry) == key]
    where = sources.get(key, "configuration")
    what, value = f"{key}: {' or: '.join(dict.fromkeys(reasons))}", first["input"]
    return UserError(what, where=where, received=value, hint=text_hint(first["type"], value))


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
