"""What a training will take, before anything runs: parameters, bytes, steps and multiply-adds, by its networks' shapes.

Nothing is loaded, and no data are read.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.config import ModelConfig
from model.diff_lmm import DiffLMM
from model.qformer.qformer import frames_per_chunk_of
from stages.batches.order import EpochOrder
from stages.config import TrainConfig
from stages.networks.memory_law import (
    TRAINED_BYTES,
    ClipShape,
    Parts,
    StepMemory,
    on_meta,
    parts_that_fit,
    training_memory,
)
from stages.networks.multiply_adds import alignment_multiply_adds, language_multiply_adds, qformer_multiply_adds

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Part:
    """Some of the networks that are in memory while training.

    Attributes:
        name: for people.
        is_trained: or frozen.
        parameters: numbers of it.
        num_bytes: of a trained part with gradients and moments.
    """

    name: str
    is_trained: bool
    parameters: int
    num_bytes: int


@dataclass(frozen=True)
class TrainingEstimate:
    """What a training does and holds for each clip.

    Attributes:
        parts: of the networks.
        clip: the shape of one.
        step_multiply_adds: of one clip, forward and backward.
        answer_multiply_adds: of one clip that is answered by beam search.
        loss_multiply_adds: of one clip whose answer loss alone is computed, as a validation does beside answering.
        memory: a step's, by frames per chunk: the setting's own, and half of it again and again.
        frames_per_chunk: the setting's own.
    """

    parts: tuple[Part, ...]
    clip: ClipShape
    step_multiply_adds: int
    answer_multiply_adds: int
    loss_multiply_adds: int
    memory: dict[int, StepMemory]
    frames_per_chunk: int

    @property
    def loaded_bytes(self) -> int:
        """Of all weights, before the first step: trained ones are float32."""
        return sum(_FLOAT32_BYTES * part.parameters if part.is_trained else part.num_bytes for part in self.parts)

    def largest_part(self, budget: int, batch_size: int) -> Parts | None:
        """The largest part of a batch that fits into so many bytes, as training chooses it; None if none does."""
        parts = parts_that_fit(self.memory.__getitem__, budget, Parts(batch_size, self.frames_per_chunk))
        return parts if self.memory[parts.frames].total(parts.clips) <= budget else None


def num_steps(train: TrainConfig, samples: int) -> tuple[int, int]:
    """Optimizer steps of a training on so many samples, and the samples of each; none without samples."""
    if not samples:
        return 0, 0
    order = EpochOrder(samples, train.batch_size, train.seed)
    return train.epochs * order.num_batches, order.batch_size


def num_validations(train: TrainConfig) -> int:
    """How often a training validates: after every so many epochs, and after the last."""
    return -(-train.epochs // train.validate_every)


def estimate_training(
    config: ModelConfig, train: TrainConfig, clip: ClipShape, *, target_width: int, dtype: torch.dtype
) -> TrainingEstimate:
    """Add up a training's parts, memory and multiply-adds.

    Args:
        config: the networks; their configuration files are read.
        train: the recipe.
        clip: one clip.
        target_width: D of the teacher's targets.
        dtype: in which the frozen language model is held.

    Raises:
        UserError: a configuration that cannot be had.
    """
    model = on_meta(config, target_width=target_width)
    at_once = Parts(1, min(train.frames_per_chunk or frames_per_chunk_of(config.qformer.memory_slots), clip.frames))
    memory: dict[int, StepMemory] = {}
    parts: Parts | None = at_once
    while parts is not None:
        memory[parts.frames] = training_memory(
            model,
            train.model_copy(update={"frames_per_chunk": parts.frames}),
            clip,
            quantize=config.language.quantize,
            dtype=dtype,
        )
        parts = parts.halved()
    language, described = model.language.model, model.language.model.config
    shape = {"frames": clip.frames, "patches": clip.patches, "words": clip.words}
    wanted = _wanted_frames(model, train, clip.frames)
    chunk = train.frames_per_chunk
    step = qformer_multiply_adds(model.qformer, **shape, wanted=wanted, frames_per_chunk=chunk, backward=True)
    step += language_multiply_adds(language, described, clip.sequence, backward=True)
    step += 3 * model.qformer.num_queries * model.language_projection.weight.numel()
    if model.alignment is not None:
        tokens = model.qformer.num_queries + (clip.words if config.alignment.tokens == "all" else 0)
        distilled = clip.frames if wanted is None else len(wanted)
        step += alignment_multiply_adds(model.alignment, frames=distilled, tokens=tokens)
    watched = qformer_multiply_adds(model.qformer, **shape, wanted=[clip.frames - 1], backward=False)
    read = language_multiply_adds(language, described, clip.sequence, backward=False)
    return TrainingEstimate(
        parts=_parts(model, memory[at_once.frames]),
        clip=clip,
        step_multiply_adds=step,
        answer_multiply_adds=watched + config.language.num_beams * read,
        loss_multiply_adds=watched + read,
        memory=memory,
        frames_per_chunk=at_once.frames,
    )


def _wanted_frames(model: DiffLMM, train: TrainConfig, frames: int) -> list[int] | None:
    """The frames that carry a loss, None for all; those that each step draws at random are spread evenly here."""
    if model.alignment is None or train.kd_frames == "last":
        return [frames - 1]
    if train.kd_frames == "all" or train.kd_frames >= frames:
        return None
    return sorted({*np.linspace(0, frames - 1, train.kd_frames).round().astype(int).tolist(), frames - 1})


def _parts(model: DiffLMM, memory: StepMemory) -> tuple[Part, ...]:
    def count(*names: str) -> int:
        return sum(value.numel() for name, value in model.trained_parameters().items() if name.startswith(names))

    trained = {
        "Q-Former": count("qformer.qformer."),
        "queries and temporal table": count("qformer.query_tokens", "qformer.frame_positions."),
        "projection to the language model": count("language_projection."),
        "alignment heads and gates": count("alignment."),
    }
    language = sum(parameter.numel() for parameter in model.language.parameters())
    frozen = Part("language model", is_trained=False, parameters=language, num_bytes=memory.language)
    return (
        frozen,
        *(Part(name, is_trained=True, parameters=n, num_bytes=n * TRAINED_BYTES) for name, n in trained.items() if n),
    )
