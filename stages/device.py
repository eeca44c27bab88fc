"""Where and in which precision things run."""

import gc
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, cast

import torch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Compute:
    """Where the networks run and in which arithmetic."""

    device: torch.device
    dtype: torch.dtype


def pick_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_dtype(precision: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device) -> torch.dtype:
    """Arithmetic for a precision setting; auto is bfloat16 on a GPU that has it, else float32."""
    if precision == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found too little memory; libraries below it report that by a plain RuntimeError."""
    # torch on a CPU, and oneDNN, whose kernels ask for scratch memory of their own; CUDA itself, and cuBLAS, which
    # allocate beside torch's own allocator.
    texts = (
        "can't allocate memory",
        "could not create a primitive",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def unless_out_of_memory(work: Callable[[], Value]) -> Value | None:
    """What it gives; None where the memory did not hold it, and then what it took is free again."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # The error, and with it every tensor of the frames that it came through, is gone only now.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision for the block, or none when the arithmetic is float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def move(value: Value, device: torch.device) -> Value:
    """Move every tensor of a (nested) dataclass to a device; from pinned memory without waiting for it."""
    return each_tensor(value, lambda tensor: tensor.to(device, non_blocking=True))


def each_tensor(value: Value, change: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """The (nested) dataclass with every tensor changed."""
    changed: Any = value
    if isinstance(value, torch.Tensor):
        changed = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: each_tensor(getattr(value, field.name), change) for field in fields(value)}
        changed = type(value)(**parts)
    return cast("Value", changed)
