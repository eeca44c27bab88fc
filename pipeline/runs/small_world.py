"""Warnings that the bundled tiny networks were trained on the synthetic videos, and know nothing else."""

from pipeline.screen.console import say
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.weights.repository import BUNDLED_PREFIX

# The card of the videos that they know.
_KNOWN = "synthetic"
_WARNING = "warning: the bundled tiny networks know the synthetic videos only;"


def warn_of_unknown_data(config: PipelineConfig) -> None:
    """Warn where tiny networks are used on another data set than the synthetic one."""
    name = locations.card_of(config).name
    if _is_tiny(config) and name != _KNOWN:
        say(f"{_WARNING} on {name!r} they show that every step works, and their answers mean nothing")


def warn_of_unknown_video(config: PipelineConfig) -> None:
    """Warn where tiny networks answer about a video file, which may be any."""
    if _is_tiny(config):
        say(f"{_WARNING} about any other video this answer means nothing")


def _is_tiny(config: PipelineConfig) -> bool:
    sources = (config.encoder.source, config.teacher.source, config.language.source)
    return any(source.startswith(BUNDLED_PREFIX) for source in sources)
