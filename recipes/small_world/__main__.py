"""`python -m recipes.small_world`: trains the tiny frozen networks from scratch, probes them and writes their cards."""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

from recipes.small_world.cards import write_cards
from recipes.small_world.measure import measure
from recipes.small_world.parts import PARTS, Made
from recipes.small_world.record import PROBE_TOLERANCE, Record, differences, load_record, save_record
from recipes.small_world.settings import CONFIG, WorldSettings, read_settings
from recipes.small_world.sheet import write_sheet
from stages.errors import UserError

RECORD, SHEET = "record.json", "samples.png"
_DIFFERENT = 3


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        settings = read_settings(options.settings)
        shipped = None if options.against is None else load_record(options.against)
        _require_device(options.device)
        _make_room(options.out)
        record = make(options.out, settings, options.device)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: {sum(record.sizes.values()) / 1e6:.1f} MB, {record.seconds['all'] / 60:.1f} minutes")
    return 0 if shipped is None else _compare(shipped, record)


def make(out: Path, settings: WorldSettings, device: str) -> Record:
    """Train all networks into `out`, which appears when all is done; UserError as the parts raise it."""
    started = time.perf_counter()
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        parts = _train(temporary, settings, device)
        trained = time.perf_counter()
        probes = measure(temporary, settings)
        record = _record(temporary, settings, parts, probes, (started, trained, time.perf_counter()))
        save_record(record, temporary / RECORD)
        write_cards(temporary, record)
        write_sheet(temporary, temporary / SHEET, settings)
        _let_all_read(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _let_all_read(folder: Path) -> None:
    """Temporary files and folders are readable by their maker only; what is shipped is not."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _train(folder: Path, settings: WorldSettings, device: str) -> list[Made]:
    """All parts at once where the CPU has a core for each, one after the other on a GPU."""
    at_once = min(len(PARTS), os.cpu_count() or 1) if device == "cpu" else 1
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(part, folder, settings, device) for part in PARTS]
        return [one.result() for one in running]


def _record(
    folder: Path,
    settings: WorldSettings,
    parts: list[Made],
    probes: dict[str, dict[str, float]],
    times_s: tuple[float, float, float],
) -> Record:
    trained = {name: one for part in parts for name, one in part.trained.items()}
    read = [part.reading_accuracy for part in parts if part.reading_accuracy is not None]
    started, ended, measured = times_s
    return Record(
        settings=settings.model_dump(mode="json"),
        probes={**probes, "language model": {"captions read": read[0]}},
        losses={name: one.loss for name, one in trained.items()},
        steps={name: one.steps for name, one in trained.items()},
        seconds={
            **{name: one.seconds for name, one in trained.items()},
            "training": ended - started,
            "probes": measured - ended,
            "all": measured - started,
        },
        versions={name: version(name) for name in ("torch", "diffusers", "transformers")},
        sizes={
            path.name: sum(file.stat().st_size for file in path.rglob("*.safetensors"))
            for path in sorted(folder.iterdir())
            if path.is_dir()
        },
    )


def _compare(shipped: Record, record: Record) -> int:
    found = differences(shipped, record, PROBE_TOLERANCE)
    for line in found:
        print(line)
    asked = {(name, one) for run in (shipped, record) for name, scores in run.probes.items() for one in scores}
    print(f"{len(asked) - len(found)} of {len(asked)} probe results are within {PROBE_TOLERANCE} of the record's")
    return _DIFFERENT if found else 0


def _make_room(out: Path) -> None:
    """Make the folder that `out` is to be in; UserError if that cannot be, or `out` is there."""
    if out.exists():
        raise UserError("already there", where="--out", received=str(out), hint="choose a new folder, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("cannot be made", where="--out", received=str(out), hint=str(error)) from error


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter is what a build without CUDA raises
        raise UserError(
            "no such device here", where="--device", received=device, allowed="cpu, cuda or cuda:N"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.small_world",
        description="Train the tiny frozen networks from scratch on frames of the synthetic world, probe them, and "
        "write them with their cards, a record and a sheet of samples.",
        epilog=f"Exit codes: 0 done; 2 bad input; {_DIFFERENT} done, but probes differ from those of --against.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--settings", type=Path, default=CONFIG, help="configuration (default: %(default)s)")
    parser.add_argument("--against", type=Path, help="a record.json whose probe results are to be met")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device of the trainings, but for the language model's, which is short (default here: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
