"""Tokens and widths of the frozen networks, from their configurations alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import EncoderConfig, ModelConfig, TeacherConfig
from stages.errors import UserError
from stages.frozen.load import DINOV2_FAMILY, ORIGINAL_SUFFIXES, TOWER_FAMILY
from stages.weights.dit_original import original_dit_config
from stages.weights.instructblip import INSTRUCTBLIP, instructblip_config, loading, naming
from stages.weights.repository import Repository, load_without_code

# What the default checkpoints' configurations say, so that they can be planned for before they are downloaded: P and C
# of InstructBLIP's ViT-g, D of DiT-XL/2.
_PUBLISHED_ENCODERS = {"Salesforce/instructblip-vicuna-7b": (257, 1408)}


_PUBLISHED_TEACHERS = {
    "facebook/DiT-XL-2-256": 1152,
    **{source: width for source, (_, width) in _PUBLISHED_ENCODERS.items()},
}


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
    """Read the sizes off the configuration files of encoder and teacher; no weights are read, and nothing is fetched.

    Raises:
        UserError: a configuration that cannot be had, or that settings do not fit.
    """
    encoder, teacher = config.encoder.source, config.teacher.source
    missing = (
        source
        for source, published in ((encoder, _PUBLISHED_ENCODERS), (teacher, _PUBLISHED_TEACHERS))
        if source in published and not _can_be_had(source)
    )
    assumed = tuple(dict.fromkeys(missing))
    tokens, width = _PUBLISHED_ENCODERS[encoder] if encoder in assumed else _encoder_shape(config.encoder)
    teacher_width = _PUBLISHED_TEACHERS[teacher] if teacher in assumed else _teacher_width(config.teacher)
    return FrameShape(tokens, width, teacher_width, assumed)


def _can_be_had(source: str) -> bool:
    try:
        Repository(source).find("config.json")
    except UserError:
        return False
    return True


def _encoder_shape(config: EncoderConfig) -> tuple[int, int]:
    """P and C."""
    repository = Repository(config.source)
    vision = _vision_config(repository)
    with naming(config.source):
        config.require_fits(vision.num_hidden_layers)
    return (vision.image_size // vision.patch_size) ** 2 + 1, int(vision.hidden_size)


def _vision_config(repository: Repository) -> Any:
    from transformers import CLIPConfig, CLIPVisionConfig

    described = repository.json("config.json")
    family = described.get("model_type")
    with loading("configuration", repository.source):
        if family == CLIPConfig.model_type:
            return CLIPConfig.from_dict(described).vision_config
        if family == CLIPVisionConfig.model_type:
            return CLIPVisionConfig.from_dict(described)
    if family != INSTRUCTBLIP:
        known = f"{INSTRUCTBLIP}, {CLIPConfig.model_type} or {CLIPVisionConfig.model_type}"
        raise UserError(
            "not a visual encoder that is known here",
            where=repository.source,
            received=family,
            allowed=f"config.json with model_type {known}",
        )
    return instructblip_config(repository).vision_config


def _teacher_width(config: TeacherConfig) -> int:
    """D."""
    if config.source.endswith(ORIGINAL_SUFFIXES):
        dit = _original_dit(config)
    else:
        repository = Repository(config.source)
        if repository.find("config.json") is not None:
            described = repository.json("config.json")
            if described.get("model_type") in DINOV2_FAMILY:
                return _dino_width(config, described)
            if described.get("model_type") in TOWER_FAMILY:
                return _tower_width(config, repository)
        dit = repository.json("transformer/config.json")
    with naming(config.source):
        config.require_fits(dit)
    return int(dit["num_attention_heads"] * dit["attention_head_dim"])


def _original_dit(config: TeacherConfig) -> Mapping[str, Any]:
    path = Path(config.source).expanduser()
    if not path.is_file():
        raise UserError("no such file", where="teacher.source", received=config.source)
    loaded = load_without_code(path, hint="save its moving average alone: torch.save(checkpoint['ema'], path)")
    with naming(config.source):
        return original_dit_config(loaded.get("ema", loaded), config.heads)


def _dino_width(config: TeacherConfig, described: dict[str, Any]) -> int:
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    plain = described["model_type"] == Dinov2Config.model_type
    with loading("configuration", config.source):
        dino = (Dinov2Config if plain else Dinov2WithRegistersConfig).from_dict(described)
    with naming(config.source):
        config.require_fits_dino(dino.num_hidden_layers)
    return int(dino.hidden_size)


def _tower_width(config: TeacherConfig, repository: Repository) -> int:
    vision = _vision_config(repository)
    with naming(config.source):
        config.require_fits_tower(vision.num_hidden_layers)
    return int(vision.hidden_size)
