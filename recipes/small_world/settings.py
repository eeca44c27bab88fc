"""The recipe's settings; the values stand in config.yaml and nowhere else."""

from pathlib import Path

from model.config import Settings
from stages.records import parse_record, read_yaml

CONFIG = Path(__file__).with_name("config.yaml")


class FrameSettings(Settings):
    """The pictures that the networks learn from: of how many videos, how many frames of each, by which seed."""

    videos: int
    each: int
    world_seed: int


class VAESettings(Settings):
    """The KL-VAE: channels of its levels, each but the last halving the picture, and its training."""

    channels: tuple[int, ...]
    steps: int
    batch: int
    lr: float
    square_weight: float
    """Of the mean square error, beside the mean absolute one."""
    edge_weight: float
    """Of the error in differences between neighbouring pixels, in which small things count."""
    kl_weight: float


class DiffusionSettings(Settings):
    """The class-conditional DiT and its training by Eq. 2-3."""

    layers: int
    heads: int
    head_width: int
    steps: int
    batch: int
    lr: float
    no_class: float
    """Share of samples that are given the null class."""
    ema: float
    """Decay per step of the moving average of the weights, which is what is kept."""


class ContrastSettings(Settings):
    """The vision tower, the text tower it is trained against, and their training."""

    layers: int
    width: int
    heads: int
    text_layers: int
    text_width: int
    steps: int
    groups: int
    group_size: int
    """Frames of a batch that have one scene, light and look, so that only small things tell them apart."""
    lr: float
    names_detail: float
    """How often a caption names a small thing: each of the glyph, the stripes and the mouth."""


class ReadingSettings(Settings):
    """The language model and its training."""

    layers: int
    width: int
    heads: int
    steps: int
    batch: int
    lr: float


class WorldSettings(Settings):
    """All of the recipe."""

    seed: int
    frames: FrameSettings
    vae: VAESettings
    diffusion: DiffusionSettings
    contrast: ContrastSettings
    reading: ReadingSettings
    probe_seed: int
    probe_videos: int
    probe_held_out: int
    sheet_seed: int
    sheet_steps: int
    sheet_guidance: float
    sheet_columns: int


def read_settings(path: Path = CONFIG) -> WorldSettings:
    """Read a configuration.

    Raises:
        UserError: what is wrong with it, with the file and the place in it.
    """
    return parse_record(WorldSettings, read_yaml(path), str(path))
