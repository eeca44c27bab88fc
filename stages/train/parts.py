"""How a step is cut where the settings leave it open: as much at once as the law of its memory says fits."""

from dataclasses import replace

from model.config import Quantization
from model.diff_lmm import DiffLMM
from model.qformer.qformer import frames_per_chunk_of
from stages.config import TrainConfig
from stages.device import Compute
from stages.free_memory import usable_memory
from stages.networks.memory_law import (
    FLOAT32_BYTES,
    TRAINED_BYTES,
    ClipShape,
    Parts,
    StepMemory,
    frames_with_loss,
    parts_that_fit,
    step_memory,
)


def parts_for(
    config: TrainConfig,
    model: DiffLMM,
    shape: ClipShape,
    compute: Compute,
    *,
    samples: int,
    quantize: Quantization,
    with_moments: bool,
) -> Parts:
    """The parts that the settings name, or the largest that fit beside the model that is loaded.

    Args:
        config: the recipe.
        model: on its device.
        shape: the largest clip.
        compute: device and arithmetic.
        samples: of a batch, in this process.
        quantize: how the language model's matrices are held.
        with_moments: whether the optimizer has its moments already.
    """
    whole = Parts(samples, config.frames_per_chunk or frames_per_chunk_of(model.qformer.config.memory_slots))
    whole = replace(whole, frames=min(whole.frames, shape.frames))
    if config.micro_batch_size != "auto":
        return replace(whole, clips=min(samples, config.micro_batch_size))
    on_cpu = compute.device.type == "cpu"
    language, trained = model.language.model, sum(p.numel() for p in model.trained_parameters().values())

    def memory_of(frames: int) -> StepMemory:
        return step_memory(
            model.qformer,
            shape,
            language_config=language.config,
            language_bytes=0,
            trained=trained,
            bytes_each=language.get_input_embeddings().weight.dtype.itemsize,
            quantize=quantize,
            frames_per_chunk=frames,
            longest=frames_with_loss(config, shape.frames, distils=model.alignment is not None),
            read_ahead=config.loader_workers * config.prefetch if on_cpu else 0,
        )

    there = trained * TRAINED_BYTES - bytes_to_come(model, with_moments=with_moments)
    return parts_that_fit(memory_of, usable_memory(compute.device) + there, whole)


def bytes_to_come(model: DiffLMM, *, with_moments: bool) -> int:
    """What a first step adds for good: gradients and, where the optimizer has none yet, AdamW's two moments."""
    trained = sum(p.numel() for p in model.trained_parameters().values())
    return trained * FLOAT32_BYTES * (1 if with_moments else 3)
