"""Common GPUs as their makers describe them: what a plan is made for where there is none."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.free_memory import usable_of

ASSUMED_SHARE = 0.4
"""The part of its peak that a GPU is taken to reach where nothing was measured: an assumption, not a measurement."""

GB = 10**9
# CUDA itself and its libraries, about.
_CUDA_BYTES = GB


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: part of what CUDA calls it.
        memory_bytes: of its own.
        peak: dense bfloat16 operations a second, a multiply-add being two of them; None: not known.
    """

    name: str
    memory_bytes: int
    peak: float | None

    def budget(self, loaded: int) -> int:
        """What training, once so many bytes of weights are loaded, reckons with for them and its steps."""
        return loaded + usable_of(max(0, self.memory_bytes - _CUDA_BYTES - loaded))

    def seconds(self, multiply_adds: float) -> float | None:
        """How long so many take at the assumed share of the peak."""
        return None if self.peak is None else 2 * multiply_adds / (self.peak * ASSUMED_SHARE)


# Dense, with float32 sums: NVIDIA's data sheets of A4000 (half of its figure, which counts sparse factors), L40S, A100,
# H100 SXM and H200 SXM (half, likewise), and Ada's white paper for the RTX 4090.
COMMON_GPUS: Sequence[Gpu] = (
    Gpu("RTX A4000", 16 * GB, 76.7e12),
    Gpu("RTX 4090", 24 * GB, 165.2e12),
    Gpu("L40S", 48 * GB, 362e12),
    Gpu("A100", 80 * GB, 312e12),
    Gpu("H100", 80 * GB, 989e12),
    Gpu("H200", 141 * GB, 989e12),
)
# Cards of the same names with fewer cores or a lower clock; of the A100, both forms are alike.
_OTHER_FORMS = ("H100 PCIe", "NVL", "Laptop", "4090 D")


def this_gpu() -> Gpu | None:
    """The first GPU of this machine; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    is_other = any(form in found.name for form in _OTHER_FORMS)
    peak = next((gpu.peak for gpu in COMMON_GPUS if gpu.name in found.name and not is_other), None)
    return Gpu(found.name, found.total_memory, peak)
