"""Both frozen networks of Stage 1 on one device, given passes of one shape."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from model.config import EncoderConfig, TeacherConfig
from stages.config import ExtractConfig
from stages.device import is_out_of_memory, pick_device, pick_dtype
from stages.errors import LackOfMemoryError
from stages.extract.pass_size import gpu_pass, set_pass
from stages.frozen.load import load_encoder, load_teacher
from stages.wording import counted

_LOG = logging.getLogger(__name__)


# Part of a GPU's memory that stays free beside the largest pass tried: other passes need a little more or less.
_GPU_MARGIN = 0.1


@dataclass(frozen=True)
class ExtractionJob:
    """What every worker of one extraction needs to know.

    `clock_fps` is the rate of the data set's frames, for videos that carry no times at all.
    """

    encoder: EncoderConfig
    teacher: TeacherConfig
    extract: ExtractConfig
    cache_root: str
    clock_fps: float | None = None


class FrozenPair:
    """Both frozen networks on one device, always given `batch_frames` frames, the missing ones filled up.

    With a fixed shape a frame's numbers do not depend on how many frames it shares a pass with: on a CPU they are the
    same bit for bit, so that an extraction that was killed and resumed equals one that was not.

    Args:
        job: which networks, in which precision, how many frames at once.

    Raises:
        UserError: a checkpoint cannot be opened.
    """

    def __init__(self, job: ExtractionJob) -> None:
        self.device = pick_device()
        self.dtype = pick_dtype(job.extract.precision, self.device)
        self.encoder = load_encoder(job.encoder).to(self.device, self.dtype)
        self.teacher = load_teacher(job.teacher).to(self.device)
        self.teacher.lower_precision(self.dtype)
        self.sizes_px = tuple((size, size) for size in (self.encoder.size_px, self.teacher.size_px))
        self._encoder: Callable[[torch.Tensor], torch.Tensor] = self.encoder
        self._teacher: Callable[[torch.Tensor], torch.Tensor] = self.teacher
        self.batch_frames = set_pass(job.extract, on_gpu=self.device.type == "cuda") or self.find_pass()
        if job.extract.compile:
            # After the search, which would have each of its shapes compiled. CUDA graphs are left out on purpose: they
            # belong to the thread that records them, and passes run in another thread than this.
            self._encoder = torch.compile(self.encoder, dynamic=False)
            self._teacher = torch.compile(self.teacher, dynamic=False)

    def find_pass(self) -> int:
        """Find out on a GPU how many frames a pass is to have; see `stages.extract.pass_size`.

        Raises:
            LackOfMemoryError: not even one frame fits into the memory.
        """
        found = gpu_pass(self._try_on_gpu)
        if not found:
            raise self._too_little_memory()
        return found

    def encode(self, encoder_view: np.ndarray, teacher_view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both networks on the same frames, each in its own size; a lack of memory halves `batch_frames`.

        Views [T, S, S, 3] uint8 -> features [T, P, C] float32 and y* [T, D] float32.

        Raises:
            LackOfMemoryError: not even one frame fits into the memory.
        """
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        start = 0
        while start < len(encoder_view):
            rows = slice(start, start + self.batch_frames)
            part = self._try_pass(encoder_view[rows], teacher_view[rows])
            if part is None:
                self._halve()
                continue
            parts.append(part)
            start += len(part[0])
        return joined(parts)

    def _try_pass(self, encoder_view: np.ndarray, teacher_view: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """One pass, None where the memory did not hold it; what it held is free again once this has returned."""
        count = len(encoder_view)
        try:
            features = self._encoder(self._to_device(encoder_view))[:count].float().cpu().numpy()
            return features, self._teacher(self._to_device(teacher_view))[:count].cpu().numpy()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                return None
            raise

    def try_empty(self, frames: int) -> bool:
        """Whether a pass of so many black frames fits into the memory."""
        self.batch_frames = frames
        return self._try_pass(*(np.zeros((frames, *size, 3), dtype=np.uint8) for size in self.sizes_px)) is not None

    def _try_on_gpu(self, frames: int) -> float | None:
        """Seconds of a pass, None where it did not fit with room to spare; the first pass of a shape is not timed."""
        fits = self.try_empty(frames)
        started = time.perf_counter()
        fits = fits and self.try_empty(frames)
        seconds = time.perf_counter() - started  # results are on the CPU, so the GPU has ended
        free, total = torch.cuda.mem_get_info(self.device)  # what a pass took stays reserved until it is given back
        torch.cuda.empty_cache()
        return seconds if fits and free >= _GPU_MARGIN * total else None

    def _to_device(self, frames: np.ndarray) -> torch.Tensor:
        """Fill up to the fixed shape and send."""
        missing = self.batch_frames - len(frames)
        if missing:
            frames = np.concatenate([frames, np.zeros((missing, *frames.shape[1:]), dtype=np.uint8)])
        return torch.from_numpy(frames).to(self.device, non_blocking=True)

    def _halve(self) -> None:
        if self.batch_frames == 1:
            raise self._too_little_memory()
        self.batch_frames //= 2
        _LOG.warning("too little memory: going on with %s per pass", counted(self.batch_frames, "frame"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_little_memory(self) -> LackOfMemoryError:
        return LackOfMemoryError("the memory does not hold both frozen networks and one frame", where=str(self.device))


def joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Features and targets of several passes, one after the other."""
    if len(parts) == 1:
        return parts[0]
    features, targets = zip(*parts, strict=True)
    return np.concatenate(features), np.concatenate(targets)
