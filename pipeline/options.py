"""The options that several commands share, and groups of them that a command takes as one parameter."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from stages.errors import UserError

if TYPE_CHECKING:
    from pipeline.settings.config import Resolved

_SETTINGS = "Settings"
Preset = Annotated[
    str | None,
    typer.Option(help="tiny, small, diff-lmm-7b or ma-lmm-7b; default diff-lmm-7b.", rich_help_panel=_SETTINGS),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with settings.", rich_help_panel=_SETTINGS)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, e.g. train.lr=3e-4. May be repeated.", rich_help_panel=_SETTINGS),
]
Dataset = Annotated[str | None, typer.Option(help="lvu, msvd_qa, synthetic, or the path of your own card (.yaml).")]
TaskName = Annotated[str | None, typer.Option("--task", help="One task of the data set; default all.")]
Videos = Annotated[str | None, typer.Option(help="Folder of the videos; default data/<dataset>/videos.")]
Annotations = Annotated[
    str | None, typer.Option(help="Folder of the annotation files; default data/<dataset>/annotations.")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Retry videos that failed before.")]
RefreshChanged = Annotated[
    bool, typer.Option("--refresh-changed", help="Extract videos again whose files have changed, or may have.")
]
CacheRoot = Annotated[str | None, typer.Option("--cache", help="Directory or URL (s3://bucket/prefix) of the cache.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
CacheFolder = Annotated[str, typer.Argument(help="Directory or URL of the cache, or an export of it.")]
RunOrModel = Annotated[str, typer.Option("--run", help="Folder of a run, or an exported model: its folder or hub id.")]


_RENAMED = {"--workers": "--processes"}
"""Options of earlier versions and their names of today, in the commands that have those."""


class OneOfEach(TyperCommand):
    """Refuses an option that is given twice and takes one value, of which the last would silently win."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for one in self.params for name in one.opts}
        for old, new in _RENAMED.items():
            if new in known and any(arg.partition("=")[0] == old for arg in args):
                raise UserError("an option has another name now", received=old, hint=f"write {new}")
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        single = (one for one in given if isinstance(one, TyperOption) and not (one.is_flag or one.multiple))
        for one in single:
            if given.count(one) > 1:
                raise UserError("given more than once, and takes one value", where=one.opts[0])
        return super().parse_args(ctx, args)


class Commands(typer.Typer):
    """A group of commands, each of which is a `OneOfEach`."""

    def command(self, name: str | None = None, **keywords: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=OneOfEach, **keywords)


@dataclass(frozen=True)
class DataOptions:
    """Which data, and where it is."""

    dataset: Dataset = None
    task: TaskName = None
    videos: Videos = None
    annotations: Annotations = None
    cache: CacheRoot = None

    def dotted(self) -> dict[str, str | None]:
        return {
            "data.dataset": self.dataset,
            "data.task": self.task,
            "data.videos": self.videos,
            "data.annotations": self.annotations,
            "cache.root": self.cache,
        }


@dataclass(frozen=True)
class SettingOptions:
    """Where settings come from that have no option of their own."""

    preset: Preset = None
    config: ConfigFile = None
    overrides: Overrides = None

    def resolve(self, options: Mapping[str, Any]) -> "Resolved":
        """See `pipeline.settings.config.resolve`; `options` are the other options, by dotted keys."""
        from pipeline.settings.config import resolve

        return resolve(preset=self.preset, config_file=self.config, options=options, overrides=self.overrides or [])


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command that takes groups one that takes their options, each in the place of its group, as typer asks."""
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: one.annotation for name, one in signature.parameters.items() if is_dataclass(one.annotation)
    }
    parameters = [part for one in signature.parameters.values() for part in _parts(one)]

    @wraps(command)
    def gathered(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    gathered.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by inspect
    gathered.__annotations__ = {one.name: one.annotation for one in parameters}
    return gathered


def _parts(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """The options of a group; of anything else, that itself."""
    if not is_dataclass(parameter.annotation):
        yield parameter
        return
    for field in fields(parameter.annotation):
        yield inspect.Parameter(field.name, parameter.kind, default=field.default, annotation=field.type)
