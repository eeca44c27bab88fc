"""What a rehearsal works on: stand-ins for the networks, one short video with one question, and what they will need."""

import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig, overlay
from stages.data.card_schema import AnnotationFiles, VideoFiles
from stages.data.synthetic.generator import write_video
from stages.data.synthetic.plan import LABELS, VideoSpec
from stages.device import Compute, pick_device, pick_dtype
from stages.frozen.shapes import frame_shape
from stages.frozen.stand_ins import put_stand_ins
from stages.networks.memory_law import ASSUMED_TEXT, ASSUMED_WORDS, ClipShape, on_meta
from stages.networks.room import needed_bytes

_VIDEO, _SECONDS = "rehearsal", 1
_CARD, _SAMPLES = "card.yaml", "samples.jsonl"
_OPEN = "what is a man doing?", "walking"
_LESS = ({"train.precision": "bfloat16"}, {"train.frames_per_chunk": 10}, {"language.quantize": "nf4"})
"""What makes a training step smaller, to be tried one after the other."""


def dress(config: PipelineConfig, folder: Path, *, language_layers: int | None) -> PipelineConfig:
    """Write stand-ins of all networks, a video and its question; the configuration that names them.

    The clip has as many frames as the data set's have; the video shows fewer, each several times. Nothing is fetched.

    Args:
        config: of what is rehearsed.
        folder: an empty one.
        language_layers: layers that are kept of the language model; None: all.

    Raises:
        UserError: a checkpoint is neither on this machine nor known, or there is no such task.
    """
    task = _write_data(config, folder)
    own: dict[str, Any] = {
        "data.dataset": str(folder / _CARD),
        "data.annotations": str(folder),
        "data.videos": str(folder),
        "data.task": task,
        "data.prompts": "ma-lmm",
        "cache.root": str(folder / "cache"),
        "run.folder": str(folder),
        "run.name": "run",
        "train.batch_size": 1,
        "train.targets": "own",
        "train.processes": 1,
        "train.shard_language": "none",
        "train.loader_workers": 0,
        "train.trackers": [],
    }
    networks = ("encoder", "teacher", "qformer", "language")
    return overlay(put_stand_ins(config, folder, networks, language_layers=language_layers), own, "rehearsal")


def _write_data(config: PipelineConfig, folder: Path) -> str:
    """The data set's own card, with one video that asks one question of one task; the task."""
    card = locations.card_of(config)
    (name, *_) = locations.tasks_of(config, card) or card.tasks
    task, spec = card.tasks[name], VideoSpec(_VIDEO, "train", _SECONDS, {one: LABELS[one][0] for one in LABELS}, (0,))
    # The lines hold the questions, so that a prompt is only what stands around one.
    templates = {"prompt": task.template, "paper_prompt": None}
    one_video: dict[str, Any] = {
        "tasks": {name: task.model_copy(update=templates)},
        "annotations": (AnnotationFiles(format="jsonl", file=_SAMPLES),),
        "videos": VideoFiles(),
        "expected": {},
        "paper": {},
    }
    described = card.model_copy(update=one_video).model_dump(mode="json")
    (folder / _CARD).write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
    row = {
        "video": _VIDEO,
        "duration_s": _SECONDS,
        "task": name,
        "question": _OPEN[0] if "{}" in task.prompt else task.prompt,
        "answer": max(task.labels or _OPEN[1:], key=len),
        "split": "train",
    }
    (folder / _SAMPLES).write_text(json.dumps(row) + "\n", encoding="utf-8")
    write_video(folder / f"{_VIDEO}.mp4", spec)
    return name


def needed(config: PipelineConfig, stage: str) -> int:
    """Bytes of Stage 2 on this machine's device, by arithmetic: of a training step, or of the weights that answer."""
    frame, device = frame_shape(config), pick_device()
    model = on_meta(config, target_width=frame.teacher_width)
    clip = ClipShape(
        locations.card_of(config).frame_rule.num_frames,
        frame.tokens,
        ASSUMED_WORDS,
        model.qformer.num_queries + ASSUMED_TEXT,
    )
    return needed_bytes(
        model,
        Compute(device, pick_dtype(config.train.precision, device)),
        config.language.quantize,
        config.train,
        clip if stage == "train" else None,
    )


def smaller(config: PipelineConfig, budget: int) -> tuple[dict[str, Any], int]:
    """The first of `_LESS`, each added to those before, with which a training step fits; and the bytes it takes then.

    If none does, all of them.
    """
    given: dict[str, Any] = {}
    for change in _LESS:
        given |= change
        need = needed(overlay(config, given, "rehearsal"), "train")
        if need <= budget:
            break
    return given, need
