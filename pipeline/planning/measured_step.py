"""One training step of the true shapes with random weights, measured on this machine."""

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
from stages.networks.memory_law import Parts
from stages.networks.pretrained import LoadedModel
from stages.train.step import Stepper
from stages.train.trial import random_batch, timed_step


@dataclass(frozen=True)
class MeasuredStep:
    """Some clips that went forward, backward and through the optimizer.

    Attributes:
        device: its name.
        clips: that went through the networks at once.
        frames: that the Q-Former computed at once.
        seconds: it took, for all clips.
        peak_bytes: most of the GPU's memory that torch held; None on a CPU.
        multiply_adds: of all clips, by arithmetic.
    """

    device: str
    clips: int
    frames: int
    seconds: float
    peak_bytes: int | None
    multiply_adds: int

    def seconds_for(self, multiply_adds: float) -> float:
        """How long so many take at this rate."""
        return self.seconds * multiply_adds / self.multiply_adds


def measure_step(
    config: PipelineConfig, shape: FrameShape, sample: Sample, parts: Parts, clip_multiply_adds: int
) -> MeasuredStep | str:
    """Take a step on the part of a batch that should fit, which is halved where it does not; or why there was none.

    Args:
        config: the settings.
        shape: of a cached frame.
        sample: as which all clips are asked about.
        parts: as which it is taken at first.
        clip_multiply_adds: of one clip.
    """
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(f"measuring a training step on this machine's {name}; --no-calibrate leaves it out")
    try:
        with with_stand_ins(config, ("qformer", "language")) as dressed:
            about = about_of(dressed, locations.card_of(config))
            loaded = LoadedModel.start(
                about, visual_width=shape.width, target_width=shape.teacher_width, seed=config.train.seed
            )
        stepper, distils = Stepper(config.train, loaded.model, loaded.compute), loaded.model.alignment is not None
        stepper.parts = parts
        batch = random_batch(loaded.tokenizers, [sample] * parts.clips, shape, distils=distils)
        if device.type == "cuda":  # where the first step also chooses kernels
            timed_step(stepper, [batch])
            torch.cuda.reset_peak_memory_stats()
        seconds = timed_step(stepper, [batch])
    except UserError as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "the networks do not fit into the memory"
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    multiply_adds = len(batch.samples) * clip_multiply_adds
    return MeasuredStep(name, stepper.parts.clips, stepper.parts.frames, seconds, peak_bytes, multiply_adds)
