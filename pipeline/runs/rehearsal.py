"""What a rehearsal works on: stand-ins for the networks, one short video with one question, and what they will need."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from model.language import SpecialTokens
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig, overlay
from stages.data.card_schema import AnnotationFiles, VideoFiles
from stages.data.synthetic.generator import write_video
from stages.data.synthetic.plan import LABELS, VideoSpec
from stages.device import pick_device, pick_dtype
from stages.free_memory import free_memory
from stages.frozen.load import teacher_sources
from stages.frozen.shapes import frame_shape
from stages.networks.build import new_diff_lmm
from stages.networks.memory_law import ClipShape, StepMemory, frozen_bytes, step_memory
from stages.weights.instructblip import language_config
from stages.weights.repository import Repository
from stages.weights.stand_in import write_stand_in

_VIDEO, _SECONDS = "rehearsal", 1
_CARD, _SAMPLES = "card.yaml", "samples.jsonl"
_OPEN = "what is a man doing?", "walking"
# Tokens of a question and of the language model's sequence; LVU's have fewer.
_WORDS, _SEQUENCE = 16, 64
_FLOAT32_BYTES = 4
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
    sources = {f"{part}.source": getattr(config, part).source for part in ("encoder", "qformer", "language")}
    sources |= {f"teacher.{name}": source for name, source in teacher_sources(config.teacher).items()}
    places = {source: folder / f"network-{number}" for number, source in enumerate(dict.fromkeys(sources.values()))}
    for source, place in places.items():
        write_stand_in(source, place, language_layers=language_layers)
    own: dict[str, Any] = {
        **{key: str(places[source]) for key, source in sources.items()},
        "qformer.start": None,
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
    dressed = overlay(config, own, "rehearsal")
    if (
        needed(dressed).of("train") > free_memory(torch.device("cpu"))
        and config.train.precision == "auto"
        and pick_device().type == "cpu"
    ):
        return overlay(dressed, {"train.precision": "bfloat16"}, "rehearsal")
    return dressed


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


@dataclass(frozen=True)
class Needs:
    """Bytes of Stage 2 on this machine's device, by arithmetic; see `stages.networks.memory_law`.

    Attributes:
        step: a training step's.
        answer: those of the weights that answer.
        at_start: of the CPU's memory, for a language model that is quantised, which is read whole first.
    """

    step: StepMemory
    answer: int
    at_start: int

    def of(self, stage: str) -> int:
        """Of a training step of one clip (`train`), or of an answer."""
        return max(self.step.total(1) if stage == "train" else self.answer, self.at_start)


def needed(config: PipelineConfig) -> Needs:
    """What a configuration's Stage 2 takes; its networks' configurations are here."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    frame, device = frame_shape(config), pick_device()
    bytes_each = pick_dtype(config.train.precision, device).itemsize
    with torch.device("meta"), no_init_weights():
        language = AutoModelForCausalLM.from_config(language_config(Repository(config.language.source)))
        language.tie_weights()
        model = new_diff_lmm(
            config,
            language=language,
            special=SpecialTokens(0, 0),
            visual_width=frame.width,
            target_width=frame.teacher_width,
            seed=0,
        )
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    quantize, frames = config.language.quantize, locations.card_of(config).frame_rule.num_frames
    frozen = frozen_bytes(language, quantize, bytes_each=bytes_each)
    step = step_memory(
        model.qformer,
        ClipShape(frames, frame.tokens, _WORDS, _SEQUENCE),
        language_config=language.config,
        language_bytes=frozen,
        trained=trained,
        bytes_each=bytes_each,
        quantize=quantize,
        frames_per_chunk=config.train.frames_per_chunk,
    )
    at_start = frozen_bytes(language, "none", bytes_each=bytes_each) if device.type == "cpu" else 0
    return Needs(step, frozen + _FLOAT32_BYTES * trained, at_start)


def smaller(config: PipelineConfig, budget: int) -> tuple[dict[str, Any], int]:
    """The first of `_LESS`, each added to those before, with which a training step fits; and the bytes it takes then.

    If none does, all of them.
    """
    given: dict[str, Any] = {}
    need = needed(config).of("train")
    for change in _LESS:
        given |= change
        need = needed(overlay(config, given, "rehearsal")).of("train")
        if need <= budget:
            break
    return given, need
