"""Frame strips: small pictures of what the model saw, decoded from the video files where those are at hand."""

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.config import ExtractConfig
from stages.data.manifest import Sample, Video
from stages.data.video_paths import join_video_path
from stages.decode import DecodeChild, DecodeError, FrameRequest
from stages.errors import UserError
from stages.urls import is_url

# As many frames of a sample as fit side by side on a phone without becoming dots.
_FRAMES = 6
_SIDE_PX = 112
_JPEG_QUALITY = 75
# A picture in a report is not worth more waiting than this, whatever the extraction was given.
_DEADLINE_S = 20.0
_REMOTE = "the video is not on this machine, and a report fetches nothing"


@dataclass(frozen=True)
class Picture:
    """One frame: the second it was asked for, and a data URI."""

    time_s: float
    uri: str


@dataclass(frozen=True)
class Strip:
    """Pictures of one sample in order of time; none, and `problem` names why, where they could not be had."""

    pictures: tuple[Picture, ...] = ()
    problem: str = ""


def strips(config: PipelineConfig, samples: Iterable[str]) -> dict[str, Strip]:
    """Return a strip for each sample id of the configured data set; nothing is raised for what is missing or broken.

    Every picture is the whole frame, squeezed to a square as the networks see it.
    """
    wanted = list(dict.fromkeys(samples))
    if not wanted:
        return {}
    try:
        root = locations.videos_root(config)
        if isinstance(root, str):
            return dict.fromkeys(wanted, Strip(problem=_REMOTE))
        manifest = locations.manifest_of(config, with_videos=True)
    except UserError as error:
        return dict.fromkeys(wanted, Strip(problem=str(error)))
    known = {sample.id: sample for sample in manifest.samples}
    with DecodeChild(memory_gb=config.extract.memory_gb) as child:
        source = _Source(child, config.extract, root, manifest.videos)
        return {
            name: source.strip(known[name])
            if name in known
            else Strip(problem="the annotations no longer have this sample")
            for name in wanted
        }


@dataclass(frozen=True)
class _Source:
    """Where pictures come from: a decode child, how it decodes, and the videos below `root`."""

    child: DecodeChild
    extract: ExtractConfig
    root: Path
    videos: Mapping[str, Video]

    def strip(self, sample: Sample) -> Strip:
        times_s = sample.frame_times_s()
        times_s = times_s[np.linspace(0, len(times_s) - 1, min(_FRAMES, len(times_s))).round().astype(int)]
        how = (self.extract.decoder, self.extract.tolerance_s)
        try:
            path = join_video_path(
                self.root, self.videos[sample.video].path, self.extract.protocols, video=sample.video
            )
            if is_url(path):
                return Strip(problem=_REMOTE)
            found = self.child.decode(FrameRequest(Path(path), times_s, ((_SIDE_PX, _SIDE_PX),), *how), _DEADLINE_S)
        except (DecodeError, UserError) as error:
            return Strip(problem=str(error))
        pairs = zip(times_s, found.views[0], strict=True)
        return Strip(tuple(Picture(float(time_s), _data_uri(frame)) for time_s, frame in pairs))


def _data_uri(frame: np.ndarray) -> str:
    """A frame [H, W, 3] uint8 as a small JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
