"""Tokens and widths of the frozen networks, before their weights are there."""

from dataclasses import dataclass

from model.config import ModelConfig
from stages.errors import UserError
from stages.frozen.load import open_encoder, open_teacher
from stages.weights.repository import Repository

# P and C of InstructBLIP's ViT-g, D of DiT-XL/2, as their configurations state them: the default checkpoints can be
# planned for before they are downloaded.
_PUBLISHED_ENCODERS = {"Salesforce/instructblip-vicuna-7b": (257, 1408)}
_PUBLISHED_TEACHERS = {"facebook/DiT-XL-2-256": 1152, "Salesforce/instructblip-vicuna-7b": 1408}


@dataclass(frozen=True)
class FrameShape:
    """What the cache holds of one frame: features [P, C] and a target [D].

    Attributes:
        tokens: P, patch tokens with the class token.
        width: C.
        teacher_width: D.
        assumed: checkpoints that are not on this machine, whose published sizes were taken.
    """

    tokens: int
    width: int
    teacher_width: int
    assumed: tuple[str, ...] = ()


def frame_shape(config: ModelConfig) -> FrameShape:
    """Read the sizes off the configuration files of encoder and teacher; no weights are looked for.

    Raises:
        UserError: a configuration that cannot be had, or that settings do not fit.
    """
    encoder, teacher = config.encoder.source, config.teacher.source
    missing = (
        source
        for source, published in ((encoder, _PUBLISHED_ENCODERS), (teacher, _PUBLISHED_TEACHERS))
        if source in published and not can_be_had(source)
    )
    assumed = tuple(dict.fromkeys(missing))
    if encoder in assumed:
        tokens, width = _PUBLISHED_ENCODERS[encoder]
    else:
        opened = open_encoder(config.encoder)
        tokens, width = opened.tokens, opened.width
    teacher_width = _PUBLISHED_TEACHERS[teacher] if teacher in assumed else open_teacher(config.teacher).width
    return FrameShape(tokens, width, teacher_width, assumed)


def can_be_had(source: str) -> bool:
    """Whether a checkpoint's configuration is on this machine or can be fetched."""
    try:
        Repository(source).find("config.json")
    except UserError:
        return False
    return True
