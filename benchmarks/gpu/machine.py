"""A GPU, or a CPU to try a program on: seconds and bytes of a piece of work, and how two results differ."""

import gc
import statistics
import time
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.published import Shapes
from stages.device import unless_out_of_memory

LOWER = torch.bfloat16


@dataclass
class Machine:
    """Where and at which shapes things are measured; `peak` is the best rate of products found so far, by dtype."""

    device: torch.device
    shapes: Shapes
    tiny: bool
    peak: dict[torch.dtype, float] = field(default_factory=dict)

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def synchronise(self):
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work, *, repeat=5, most_s=6.0):
        """Median seconds of some runs after one that is not timed; fewer of them where they take long."""
        work()
        self.synchronise()
        spent = []
        while len(spent) < (1 if self.tiny else repeat) and sum(spent) < most_s:
            spent.append(self._once(work))
        return statistics.median(spent)

    def _once(self, work):
        if not self.on_gpu:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def peak_bytes(self, work):
        """Bytes that a run takes at most beyond what was there; None on a CPU, where nobody counts them."""
        if not self.on_gpu:
            work()
            return None
        self.synchronise()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        self.synchronise()
        return torch.cuda.max_memory_allocated(self.device) - before

    def share_of_peak(self, flops_per_s):
        """Of the products in bfloat16; None before these were measured."""
        return flops_per_s / self.peak[LOWER] if LOWER in self.peak else None

    def fits(self, work):
        """Run it, and return whether the memory held it."""

        def run():
            work()
            self.synchronise()
            return True

        return unless_out_of_memory(run) is not None

    def release(self):
        """Free what no part holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def difference(expected, found):
    """Largest difference over the largest value."""
    expected, found = expected.detach().double(), found.detach().double()
    return ((expected - found).abs().max() / expected.abs().max()).item()
