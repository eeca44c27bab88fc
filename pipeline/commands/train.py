"""`pipeline train`: Stage 2."""

from dataclasses import asdict
from pathlib import Path

from pipeline import locations
from pipeline.config import PipelineConfig, Resolved
from pipeline.console import Bar, emit_json, progress_bar, say
from pipeline.run_folder import RunFolder
from pipeline.stage2 import LoadedModel, build_for_training, cached_samples, open_cache
from stages.checkpoint import Position
from stages.errors import UserError
from stages.train import Trainer
from stages.windows import WindowDataset


def run(resolved: Resolved, *, resume: bool, as_json: bool) -> Path:
    """Train, print the summary, and return the run's folder."""
    config = resolved.config
    path = locations.run_folder(config)
    if resume:
        config = _same_run(RunFolder.open(path).config(), config)
    else:
        RunFolder.require_free(path)
    trainer, loaded = _prepare(config, path, resume=resume)
    if resume and trainer.resume():
        say(f"resuming {path} after epoch {trainer.position.epoch} of {config.train.epochs}")
    best = _fit(trainer, config)
    if as_json:
        emit_json({"run": str(path), "best": asdict(best), "trained_parameters": loaded.trained_count})
    accuracy = "" if best.val_top1 is None else f", validation accuracy {best.val_top1:.1%}"
    say(f"trained {trainer.total_steps} steps; best after epoch {best.epoch}{accuracy}; run {path}")
    return path


def _prepare(config: PipelineConfig, path: Path, *, resume: bool) -> tuple[Trainer, LoadedModel]:
    manifest = locations.manifest_of(config)
    cache = open_cache(config)
    distils = config.alignment.kd_weight > 0
    train, absent = cached_samples(cache, manifest.select(splits=["train"]))
    val: list = []
    if "val" in manifest.splits:
        val, absent_val = cached_samples(cache, manifest.select(splits=["val"]))
        absent |= absent_val
    if not train:
        raise UserError("no training sample has its video in the cache", where=cache.root)
    tolerance = config.cache.tolerance_s
    train_set = WindowDataset(cache, train, tolerance_s=tolerance, with_targets=distils)
    val_set = WindowDataset(cache, val, tolerance_s=tolerance, with_targets=False) if val else None
    loaded = build_for_training(config, cache, train[0])
    stamp = {
        "cache": str(cache.root),
        "fingerprint": cache.fingerprint.digest,
        "samples": {"train": len(train), "val": len(val)},
        "videos_missing": sorted(absent),
    }
    if resume:
        RunFolder.open(path).require_same(stamp, ("fingerprint", "samples", "videos_missing"))
    else:
        RunFolder.create(path, config, stamp)
    say(
        f"{len(train)} training and {len(val)} validation samples"
        + (f"; {len(absent)} videos failed extraction and are left out" if absent else "")
        + f"; training {loaded.trained_count:,} parameters, {loaded.frozen_count:,} frozen, on {loaded.compute.device}"
    )
    return Trainer(
        config.train,
        config.language,
        loaded.model,
        loaded.tokenizers,
        train_set,
        val_set,
        run=path,
        compute=loaded.compute,
        eval_batch_size=config.evaluate.batch_size,
    ), loaded


def _fit(trainer: Trainer, config: PipelineConfig) -> Position:
    done = trainer.position.epoch * trainer.order.num_batches
    with progress_bar("train", trainer.total_steps, "steps", done=done) as bar:
        return trainer.fit(lambda row: _show(bar, row, config.train.epochs))


def _show(bar: Bar, row: dict[str, float], epochs: int) -> None:
    terms = [f"epoch {int(row['epoch']) + 1}/{epochs}", f"answer {row['answer_loss']:.3f}"]
    if "kd_loss" in row:
        terms.append(f"kd {row['kd_loss']:.3f}")
    bar.advance(note="  ".join(terms))


def _same_run(saved: PipelineConfig, asked: PipelineConfig) -> PipelineConfig:
    """Return the saved configuration; UserError if the command line asks for another one."""
    if asked != saved:
        raise UserError(
            f"--resume keeps the run's own settings, but the command differs in {_first_difference(saved, asked)}",
            where=locations.run_folder(asked),
            hint="give the options of the first call, or another --name for a new run",
        )
    return saved


def _first_difference(saved: PipelineConfig, asked: PipelineConfig) -> str:
    for branch, mine in saved:
        theirs = getattr(asked, branch)
        if mine != theirs:
            if not hasattr(mine, "model_dump"):
                return f"{branch} ({mine!r}, now {theirs!r})"
            key = next(name for name, value in mine if value != getattr(theirs, name))
            return f"{branch}.{key} ({getattr(mine, key)!r}, now {getattr(theirs, key)!r})"
    raise AssertionError("equal configurations have no difference")
