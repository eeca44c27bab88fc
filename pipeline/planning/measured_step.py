"""One training step of the true shapes with random weights, measured on this machine."""

import gc
from dataclasses import dataclass

import torch

from pipeline.runs.models import about_of
from pipeline.screen.console import say
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.data.manifest import Sample
from stages.device import is_out_of_memory, pick_device
from stages.errors import UserError
from stages.frozen.shapes import FrameShape
from stages.frozen.stand_ins import with_stand_ins
from stages.networks.pretrained import LoadedModel
from stages.train.estimate import Fit
from stages.train.step import Stepper
from stages.train.trial import random_batch, timed_step
from stages.wording import counted


@dataclass(frozen=True)
class MeasuredStep:
    """A part of a batch that went forward, backward and through the optimizer.

    Attributes:
        device: its name.
        clips: of the part.
        frames_per_chunk: of its frames at once.
        seconds: it took.
        peak_bytes: most of the GPU's memory that torch held; None on a CPU.
        multiply_adds: of the part, by arithmetic.
    """

    device: str
    clips: int
    frames_per_chunk: int
    seconds: float
    peak_bytes: int | None
    multiply_adds: int

    def seconds_for(self, multiply_adds: float) -> float:
        """How long so many take at this rate."""
        return self.seconds * multiply_adds / self.multiply_adds


def measure_step(
    config: PipelineConfig, shape: FrameShape, sample: Sample, fit: Fit, clip_multiply_adds: int
) -> MeasuredStep | str:
    """Take a step on the part of a batch that should fit, on a smaller one where it does not; or why there was none.

    Args:
        config: the settings.
        shape: of a cached frame.
        sample: as which all clips are asked about.
        fit: the part to begin with.
        clip_multiply_adds: of one clip.
    """
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(f"measuring a training step on this machine's {name}; --no-calibrate leaves it out")
    train = config.train.model_copy(update={"frames_per_chunk": fit.frames_per_chunk})
    try:
        with with_stand_ins(config, ("qformer", "language")) as dressed:
            qformer = dressed.qformer.model_copy(update={"start": None})
            about = about_of(dressed.model_copy(update={"qformer": qformer}), locations.card_of(config))
            loaded = LoadedModel.start(
                about, visual_width=shape.width, target_width=shape.teacher_width, seed=config.train.seed
            )
        stepper, clips = Stepper(train, loaded.model, loaded.compute), fit.clips
        while clips:
            try:
                return _measure(stepper, loaded, [sample] * clips, shape, name, clip_multiply_adds)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            say(f"a part of {counted(clips, 'clip')} does not fit, although it should")
            clips //= 2
            gc.collect()
            torch.cuda.empty_cache()
    except UserError as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return "one clip does not fit into the memory"


def _measure(
    stepper: Stepper, loaded: LoadedModel, samples: list[Sample], shape: FrameShape, name: str, clip_multiply_adds: int
) -> MeasuredStep:
    batch = random_batch(loaded.tokenizers, samples, shape, distils=loaded.model.alignment is not None)
    on_gpu = loaded.compute.device.type == "cuda"
    if on_gpu:  # where the first step also chooses kernels
        timed_step(stepper, [batch])
        torch.cuda.reset_peak_memory_stats()
    seconds = timed_step(stepper, [batch])
    chunk = stepper.config.frames_per_chunk
    assert chunk is not None
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
    return MeasuredStep(name, len(samples), chunk, seconds, peak_bytes, len(samples) * clip_multiply_adds)
