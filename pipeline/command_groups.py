"""The commands that have a word before them: `pipeline cache ...`, `pipeline data ...`, `pipeline config ...`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.options import (
    Annotations,
    CacheFolder,
    Commands,
    DataOptions,
    Dataset,
    Json,
    SettingOptions,
    TaskName,
    with_groups,
)

config_app = Commands(no_args_is_help=True, help="Look at the configuration.")
cache_app = Commands(no_args_is_help=True, help="Look at a feature cache, check it, convert it.")
data_app = Commands(no_args_is_help=True, help="Put a data set's files in their places, write one as plain lines.")


class CacheKind(StrEnum):
    """The kinds of store that `pipeline cache convert` writes."""

    ZARR = "zarr"
    WEBDATASET = "webdataset"
    HDF5 = "hdf5"


@cache_app.command("info")
def cache_info(root: CacheFolder, json: Json = False) -> None:
    """What the cache holds, and the fingerprint it was made under."""
    from pipeline.commands.cache import info

    info(root, as_json=json)


@cache_app.command("verify")
def cache_verify(
    root: CacheFolder,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove damaged videos, so that the next extraction writes them again."),
    ] = False,
    videos: Annotated[
        str | None, typer.Option(help="Folder or URL of the videos: compare the files with those that were extracted.")
    ] = None,
    json: Json = False,
) -> None:
    """Check every stored byte against its checksum. Exit code 3 if anything stays wrong."""
    from pipeline.commands.cache import verify

    if not verify(root, repair=repair, as_json=json, videos=videos):
        raise typer.Exit(3)


@cache_app.command("convert")
def cache_convert(
    source: Annotated[str, typer.Argument(help="A cache, or an export of one.")],
    target: Annotated[str, typer.Argument(help="A folder (hdf5: a file) or URL (zarr) with nothing in it yet.")],
    to: Annotated[CacheKind, typer.Option("--to", help="What to write.")],
    shard_gb: Annotated[float, typer.Option(min=1e-6, help="webdataset: about how large a shard may become.")] = 1.0,
    json: Json = False,
) -> None:
    """Write a cache as WebDataset shards or one HDF5 file to train from or to send, or an export as a cache again."""
    from pipeline.commands.cache import convert

    convert(source, target, to.value, shard_gb=shard_gb, as_json=json)


@cache_app.command("prune")
def cache_prune(
    root: CacheFolder,
    videos_not_in: Annotated[
        str | None,
        typer.Option(help="Remove committed videos that this data set (card name or path) does not name."),
    ] = None,
    task: TaskName = None,
    annotations: Annotations = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm that committed videos are removed.")] = False,
    json: Json = False,
) -> None:
    """Remove what killed or overtaken writers left behind; committed videos only with --videos-not-in and --yes."""
    from pipeline.commands.cache import prune

    if videos_not_in is None:
        prune(root, dry_run=dry_run, as_json=json)
        return
    named = DataOptions(videos_not_in, task, annotations=annotations)
    prune(root, dry_run=dry_run, as_json=json, keep=SettingOptions().resolve(named.dotted()).config, yes=yes)


@data_app.command("prepare")
def data_prepare(
    dataset: Annotated[str, typer.Option(help="lvu, msvd_qa, or the path of your own card (.yaml).")],
    folders: Annotated[
        list[Path], typer.Option("--from", help="Folder of downloaded files and archives. May be repeated.")
    ],
    to: Annotated[Path | None, typer.Option(help="Where annotations/ and videos/ go; default data/<dataset>.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy instead of linking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    json: Json = False,
) -> None:
    """Find a data set's annotation files and videos among downloads and link them under the names it expects.

    Archives (.tar, .zip) are looked into. Nothing is overwritten; run it again when more is downloaded.
    """
    from pipeline.commands.prepare import run_prepare

    run_prepare(dataset, folders, to, copy=copy, dry_run=dry_run, as_json=json)


@data_app.command("export")
@with_groups
def data_export(
    *,
    folder: Annotated[Path, typer.Argument(help="Where videos.jsonl, samples.jsonl and the card go.")],
    dataset: Dataset = None,
    task: TaskName = None,
    annotations: Annotations = None,
    settings: SettingOptions,
    json: Json = False,
) -> None:
    """Write a data set as plain lines to read or to change, one sample a line, and a card that reads them."""
    from pipeline.commands.prepare import run_export

    options = DataOptions(dataset, task, annotations=annotations)
    run_export(settings.resolve(options.dotted()), folder, as_json=json)


@config_app.command("show")
@with_groups
def config_show(
    *,
    dataset: Dataset = None,
    everything: Annotated[bool, typer.Option("--all", help="Show what every key means, too.")] = False,
    settings: SettingOptions,
    json: Json = False,
) -> None:
    """The resolved configuration, with the source of every value that is not a default."""
    from pipeline.commands.config import run

    run(settings.resolve({"data.dataset": dataset}), explain=everything, as_json=json)
