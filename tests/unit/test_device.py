"""Which errors mean that the memory is full, and what a process may use."""

import os

import pytest
import torch

from stages import device
from stages.extract import in_process


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_too_little_memory_is_known_by_its_error(error, is_full):
    def work():
        raise error

    if is_full:
        assert device.unless_out_of_memory(work) is None
    else:
        with pytest.raises(RuntimeError, match=str(error)):
            device.unless_out_of_memory(work)


def test_a_shard_starts_on_a_system_that_does_not_list_a_process_s_cores(monkeypatch):
    class StartedError(Exception):
        pass

    def worker(_job, *, cores):
        raise StartedError(cores)

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(in_process, "ExtractionWorker", worker)
    before = torch.get_num_threads()
    try:
        with pytest.raises(StartedError, match=f"^{os.cpu_count()}$"):
            list(in_process.process_all([], None, on_encoded=print))
    finally:
        torch.set_num_threads(before)
