"""`pipeline export`: a run's best checkpoint as a model of its own."""

from pathlib import Path

from pipeline.runs.models import about_of
from pipeline.runs.run_folder import RunFolder
from pipeline.screen.console import beside_json, emit_json, print_answer
from pipeline.settings import locations
from stages.errors import UserError
from stages.networks.checkpoint import Checkpoints
from stages.networks.exported import is_export, write_export


def run(path: Path, folder: Path, *, with_heads: bool, as_json: bool, overwrite: bool = False) -> None:
    """Write the folder and say what is in it."""
    config = RunFolder.open(path).config()
    checkpoints = Checkpoints(path)
    best = checkpoints.best()
    _require_free(folder, overwrite=overwrite)
    tensors = checkpoints.model(best)
    write_export(folder, tensors, about_of(config, locations.card_of(config)), with_heads=with_heads)
    result = {
        "run": str(path),
        "checkpoint": best,
        "folder": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    }
    if as_json:
        emit_json(result)
    with beside_json(as_json):
        size = f"{result['bytes']:,} bytes"
        print_answer(f"{best} of {path} is in {folder}, {size}; the frozen networks stay where they are")


def _require_free(folder: Path, *, overwrite: bool) -> None:
    """UserError if anything is there but an older export that may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError("a file of this name is there already", where=folder, hint="name another folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not is_export(folder):
        raise UserError(
            "the folder holds something else than an exported model", where=folder, hint="name a new or empty folder"
        )
    if not overwrite:
        raise UserError(
            "an exported model is there already",
            where=folder,
            hint="name another folder, or add --overwrite to replace it",
        )
