"""Before anything is loaded: where the networks run, in which precision, and whether the memory holds them."""

from dataclasses import replace

import torch

from model.config import ModelConfig, Quantization
from model.diff_lmm import DiffLMM
from stages.config import TrainConfig
from stages.device import Compute, pick_device, pick_dtype
from stages.errors import LackOfMemoryError
from stages.free_memory import usable_memory
from stages.networks.exported import Precision
from stages.networks.memory_law import FLOAT32_BYTES, ClipShape, frozen_bytes, on_meta, training_memory

_GB = 1e9
_NOTHING_HELPS = "neither language.quantize nor bfloat16 nor fewer frames make it fit"


def compute_for(
    networks: ModelConfig, precision: Precision, *, target_width: int | None = None, clip: ClipShape | None = None
) -> tuple[Compute, torch.dtype]:
    """Device and arithmetic, and the type that the frozen language model is read in.

    They are the same but on a CPU: where its memory does not hold the language model in float32 and the precision is
    auto, this alone is read in bfloat16.

    Args:
        networks: their configuration files are read, and nothing else.
        precision: as in `train.precision`.
        target_width: D of the teacher targets, to train with them.
        clip: one clip that is to be learned from; None: nothing is.

    Raises:
        LackOfMemoryError: a CPU's memory does not hold the networks and one step with one frame at a time.
    """
    device = pick_device()
    dtype = pick_dtype(precision, device)
    compute = Compute(device, dtype)
    if device.type != "cpu":
        return compute, dtype
    model, free = on_meta(networks, target_width=target_width), usable_memory(device)
    types = [torch.float32, torch.bfloat16] if precision == "auto" else [dtype]
    quantize = networks.language.quantize

    def needed(dtype: torch.dtype, quantize: Quantization, clip: ClipShape | None) -> int:
        return needed_bytes(model, Compute(device, dtype), quantize, TrainConfig(frames_per_chunk=1), clip)

    for frozen in types:
        if needed(frozen, quantize, clip) <= free:
            return compute, frozen
    least = needed(types[-1], quantize, clip)
    others = {
        "train.precision=bfloat16": needed(torch.bfloat16, quantize, clip),
        "language.quantize=int8": needed(types[-1], "int8", clip),
        "language.quantize=nf4": needed(types[-1], "nf4", clip),
    }
    if clip is not None:
        others["fewer frames (num_frames of the card)"] = needed(types[-1], quantize, replace(clip, frames=1))
    enough = [f"{name} ({size / _GB:.1f} GB)" for name, size in others.items() if size <= free]
    raise LackOfMemoryError(
        f"the networks{' and a training step of one sample' if clip else ''} need {least / _GB:.1f} GB of memory, "
        f"and {free / _GB:.1f} GB can be had",
        where=f"language.source {networks.language.source}",
        hint=f"set {' or '.join(enough)}" if enough else f"take a machine with more memory: {_NOTHING_HELPS}",
    )


def needed_bytes(
    model: DiffLMM, compute: Compute, quantize: Quantization, train: TrainConfig, clip: ClipShape | None
) -> int:
    """Bytes of a model, and of a training step of one clip with it.

    Args:
        model: it may be on the meta device.
        compute: device, and the type in which the frozen language model is read.
        quantize: how it is held.
        train: the recipe, as in `training_memory`.
        clip: the clip; None: there is no step.
    """
    bytes_each = compute.dtype.itemsize
    # On a CPU it is read whole before its matrices are quantised, and only then comes what else there is.
    on_cpu = compute.device.type == "cpu"
    read = frozen_bytes(model.language.model, "none", bytes_each=bytes_each) if on_cpu else 0
    if clip is not None:
        return max(read, training_memory(model, train, clip, quantize=quantize, dtype=compute.dtype).total(1))
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    return max(read, frozen_bytes(model.language.model, quantize, bytes_each=bytes_each) + trained * FLOAT32_BYTES)
