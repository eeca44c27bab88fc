"""Tokens and widths of the frozen networks, before their weights are there."""

from dataclasses import dataclass

from model.config import ModelConfig
from stages.errors import UserError
from stages.frozen.load import open_encoder, open_teacher
from stages.weights.published import PUBLISHED
from stages.weights.repository import Repository


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
    # Published checkpoints can be planned for before they are downloaded.
    assumed = tuple(one for one in dict.fromkeys((encoder, teacher)) if one in PUBLISHED and not can_be_had(one))
    if encoder in assumed and (tower := PUBLISHED[encoder].vision) is not None:
        tokens, width = (tower["image_size"] // tower["patch_size"]) ** 2 + 1, tower["hidden_size"]
    else:
        opened = open_encoder(config.encoder)
        tokens, width = opened.tokens, opened.width
    teacher_width = _published_width(teacher) if teacher in assumed else open_teacher(config.teacher).width
    return FrameShape(tokens, width, teacher_width, assumed)


def _published_width(teacher: str) -> int:
    """D of a published DiT or vision tower."""
    tower = PUBLISHED[teacher].vision
    if tower is not None:
        return int(tower["hidden_size"])
    dit = PUBLISHED[teacher].configurations["transformer/config.json"]
    return int(dit["num_attention_heads"] * dit["attention_head_dim"])


def can_be_had(source: str) -> bool:
    """Whether a checkpoint's configuration is on this machine or can be fetched."""
    try:
        Repository(source).find("config.json")
    except UserError:
        return False
    return True
