"""The networks of Stage 1 from their checkpoints: visual encoder and teacher, described or loaded.

What a checkpoint says of itself (`model_type` in its config.json, the subfolders of a DiT pipeline, the name of an
original DiT file) decides which network it is.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model.config import EncoderConfig, TeacherConfig
from model.dit_original import DiffusersNames, original_dit_config
from model.pixels import CLIP_PIXELS, IMAGENET_PIXELS, PixelStatistics
from stages.cache.fingerprint import Scalar
from stages.errors import UserError
from stages.frozen_source import FrozenSource, remembered
from stages.instructblip import INSTRUCTBLIP, instructblip_config, naming
from stages.weights import CheckpointTensors, LoadingReport, OnLoaded, Repository, load_without_code, log_loading

if TYPE_CHECKING:
    from model.teacher import Teacher
    from model.vision import VisionEncoder

# What each frozen network reads from its checkpoint, by name: the digest in the cache's fingerprint covers just this.
_VISION_EMBEDDINGS = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.",
    "embeddings.position_embedding",
    "pre_layrnorm.",  # CLIP's, spelt like this
)
_DINO_EMBEDDINGS = (
    "embeddings.cls_token",
    "embeddings.register_tokens",
    "embeddings.patch_embeddings.",
    "embeddings.position_embeddings",
)
_DIT_KEYS = (
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "num_embeds_ada_norm",
    "in_channels",
    "patch_size",
    "sample_size",
    "activation_fn",
    "attention_bias",
)
_VAE_KEYS = (
    "in_channels",
    "latent_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "norm_num_groups",
)
_VAE_PREFIXES = ("encoder.", "quant_conv.")

_CLIP, _CLIP_VISION = "clip", "clip_vision_model"
_DINOV2 = "dinov2"
DINOV2_FAMILY = (_DINOV2, "dinov2_with_registers")
ORIGINAL_SUFFIXES = (".pt", ".pth")
# The VAE that DiT's own sampler takes by default (FACTS.md D.1); original files hold none.
ORIGINAL_VAE = "stabilityai/sd-vae-ft-mse"
# The published DINOv2's pictures; their table of positions is for 518 px.
_DINO_SIZE_PX = 224


def describe_encoder(config: EncoderConfig) -> FrozenSource:
    """Input size and weight digest of the visual encoder, without building it.

    Raises:
        UserError: no InstructBLIP or CLIP checkpoint, or one without the layer asked for.
    """
    return remembered("encoder", config, lambda: _describe_encoder(config))


def _describe_encoder(config: EncoderConfig) -> FrozenSource:
    opened = _open_encoder(config)
    with naming(config.source):
        config.require_fits(opened.described.num_hidden_layers)
    layers = range(config.layer or opened.described.num_hidden_layers)
    names = (*_VISION_EMBEDDINGS, *(f"encoder.layers.{index}." for index in layers))
    if opened.family == INSTRUCTBLIP and config.layer is None:
        names = (*names, "post_layernorm.")
    digest = opened.tensors.digest(opened.prefix + name for name in names)
    facts: dict[str, Scalar] = {"family": opened.family, "pixels": str(opened.pixels)}
    return FrozenSource(int(opened.described.image_size), digest, facts, (opened.tensors.loading(),))


def load_encoder(config: EncoderConfig, on_loaded: OnLoaded = log_loading) -> "VisionEncoder":
    """Build the visual encoder and read its weights, and only those; `on_loaded` is told what was read.

    Raises:
        UserError: no InstructBLIP or CLIP checkpoint, or one that lacks the layer or a tensor.
    """
    from model.vision import VisionEncoder

    opened = _open_encoder(config)
    with naming(config.source):
        encoder = VisionEncoder(
            config,
            vision_config=opened.described,
            tensors=opened.tensors,
            prefix=opened.prefix,
            pixels=opened.pixels,
        )
    on_loaded(opened.tensors.loading())
    return encoder


def describe_teacher(config: TeacherConfig) -> FrozenSource:
    """Input size and weight digest of the teacher, without building it.

    Raises:
        UserError: neither a DiT nor a DINOv2, or one that settings do not fit.
    """
    return remembered("teacher", config, lambda: _describe_teacher(config))


def _describe_teacher(config: TeacherConfig) -> FrozenSource:
    opened = _open_teacher(config)
    with naming(config.source):
        return opened.describe(config)


def load_teacher(config: TeacherConfig, on_loaded: OnLoaded = log_loading) -> "Teacher":
    """Build the teacher and read the weights that it needs, and only those; `on_loaded` is told what was read.

    Raises:
        UserError: neither a DiT nor a DINOv2, or one that settings do not fit or that lacks a tensor.
    """
    opened = _open_teacher(config)
    with naming(config.source):
        teacher = opened.load(config)
    for report in opened.loading():
        on_loaded(report)
    return teacher


# --- visual encoders


@dataclass(frozen=True)
class _OpenedEncoder:
    """A vision tower's configuration object of transformers, and where its tensors are."""

    family: str
    described: Any
    tensors: CheckpointTensors
    prefix: str
    pixels: PixelStatistics


def _open_encoder(config: EncoderConfig) -> _OpenedEncoder:
    repository = Repository(config.source)
    family = repository.json("config.json").get("model_type")
    tensors = repository.tensors()
    prefix = "vision_model."
    if family == INSTRUCTBLIP:
        described = instructblip_config(repository).vision_config
    elif family in (_CLIP, _CLIP_VISION):
        described = _clip_vision_config(repository, family)
        # transformers 5 writes a bare vision model without the prefix, earlier versions with it.
        prefix = prefix if any(name.startswith(prefix) for name in tensors) else ""
        family = _CLIP
    else:
        raise UserError(
            "not a visual encoder that is known here",
            where=config.source,
            received=family,
            allowed=f"config.json with model_type {INSTRUCTBLIP}, {_CLIP} or {_CLIP_VISION}",
            hint="set encoder.source to an InstructBLIP or CLIP folder or hub id",
        )
    return _OpenedEncoder(family, described, tensors, prefix, _pixel_statistics(repository, CLIP_PIXELS))


def _clip_vision_config(repository: Repository, family: str) -> Any:
    from transformers import CLIPConfig, CLIPVisionConfig

    described = repository.json("config.json")
    return CLIPConfig.from_dict(described).vision_config if family == _CLIP else CLIPVisionConfig.from_dict(described)


# --- teachers


@dataclass(frozen=True)
class _OpenedDiT:
    """A DiT's and a VAE's configuration, and where their tensors are.

    Attributes:
        dit: diffusers' `transformer/config.json`, or the same deduced from an original file.
        dit_tensors: of the transformer; none are needed for random weights.
        original: whether they have the original file's names.
        vae: the VAE's `config.json`.
    """

    dit: Mapping[str, Any]
    dit_tensors: CheckpointTensors | None
    original: bool
    vae: Mapping[str, Any]
    vae_tensors: CheckpointTensors

    def describe(self, config: TeacherConfig) -> FrozenSource:
        config.require_fits(self.dit)
        if config.random_seed is not None:
            digest = _random_digest(config.random_seed, self.dit)
        elif self.original:
            digest = self._tensors().digest(self._shown(config).originals)
        else:
            blocks = (f"transformer_blocks.{index}." for index in range(config.block))
            digest = self._tensors().digest(("pos_embed.", *blocks))
        size = self.dit["sample_size"] * 2 ** (len(self.vae["block_out_channels"]) - 1)
        facts: dict[str, Scalar] = {"family": "dit", "latent": "posterior mode", "pooling": "mean over tokens"}
        digest = f"{digest}-{self.vae_tensors.digest(_VAE_PREFIXES)}"
        return FrozenSource(size, digest, facts, self.loading())

    def load(self, config: TeacherConfig) -> "Teacher":
        from model.dit_teacher import DiTTeacher

        config.require_fits(self.dit)
        tensors: Mapping[str, Tensor] = {}
        if config.random_seed is None:
            tensors = self._shown(config) if self.original else self._tensors()
        return DiTTeacher(
            config, dit_config=self.dit, dit_tensors=tensors, vae_config=self.vae, vae_tensors=self.vae_tensors
        )

    def loading(self) -> tuple[LoadingReport, ...]:
        """What has been read of the checkpoints."""
        read = (self.dit_tensors, self.vae_tensors)
        return tuple(tensors.loading() for tensors in read if tensors is not None)

    def _tensors(self) -> CheckpointTensors:
        assert self.dit_tensors is not None
        return self.dit_tensors

    def _shown(self, config: TeacherConfig) -> DiffusersNames:
        return DiffusersNames(self._tensors(), config.block)


@dataclass(frozen=True)
class _OpenedDino:
    """A DINOv2's configuration object of transformers, and where its tensors are."""

    family: str
    described: Any
    tensors: CheckpointTensors | None
    size_px: int
    pixels: PixelStatistics

    def describe(self, config: TeacherConfig) -> FrozenSource:
        config.require_fits_dino(self.described.num_hidden_layers)
        facts: dict[str, Scalar] = {"family": self.family, "pixels": str(self.pixels)}
        if self.tensors is None:
            assert config.random_seed is not None
            digest = _random_digest(config.random_seed, self.described.to_dict())
        else:
            blocks = range(config.dino_block or self.described.num_hidden_layers)
            names = (*_DINO_EMBEDDINGS, *(f"encoder.layer.{index}." for index in blocks))
            digest = self.tensors.digest(names if config.dino_block else (*names, "layernorm."))
        return FrozenSource(self.size_px, digest, facts, self.loading())

    def loading(self) -> tuple[LoadingReport, ...]:
        """What has been read of the checkpoint."""
        return () if self.tensors is None else (self.tensors.loading(),)

    def load(self, config: TeacherConfig) -> "Teacher":
        from model.dino_teacher import DinoTeacher

        return DinoTeacher(
            config,
            dino_config=self.described,
            tensors={} if self.tensors is None else self.tensors,
            size_px=self.size_px,
            pixels=self.pixels,
        )


def _open_teacher(config: TeacherConfig) -> _OpenedDiT | _OpenedDino:
    if config.source.endswith(ORIGINAL_SUFFIXES):
        return _open_original_dit(config)
    repository = Repository(config.source)
    found = repository.find("config.json")
    # A DiT pipeline has no configuration at its root.
    family = None if found is None else repository.json("config.json").get("model_type")
    return _open_dino(config, repository, family) if family in DINOV2_FAMILY else _open_dit(config, repository)


def _open_dit(config: TeacherConfig, repository: Repository) -> _OpenedDiT:
    dit = repository.json("transformer/config.json")
    _require_keys(dit, _DIT_KEYS, f"{repository.source}/transformer/config.json", "a DiT")
    if config.heads is not None:
        raise UserError(
            "only an original DiT file is in need of it; transformer/config.json says how many heads there are",
            where="teacher.heads",
            received=config.heads,
            allowed="null",
        )
    tensors = None if config.random_seed is not None else repository.tensors("transformer")
    return _OpenedDiT(dit, tensors, False, *_open_vae(config.vae_source, pipeline=repository))


def _open_original_dit(config: TeacherConfig) -> _OpenedDiT:
    path = Path(config.source).expanduser()
    if not path.is_file():
        raise UserError("no such file", where="teacher.source", received=config.source)
    tensors = _OriginalTensors(path)
    with naming(config.source):
        dit = original_dit_config(tensors, config.heads)
    return _OpenedDiT(dit, tensors, True, *_open_vae(config.vae_source or ORIGINAL_VAE, pipeline=None))


class _OriginalTensors(CheckpointTensors):
    """The tensors of an original DiT file: as published, or the moving average of one that DiT's training wrote."""

    def __init__(self, path: Path) -> None:
        loaded = load_without_code(path, hint="save its moving average alone: torch.save(checkpoint['ema'], path)")
        tensors = loaded.get("ema", loaded) if isinstance(loaded, dict) else None
        if not isinstance(tensors, dict):
            raise UserError("holds no tensors by name", where=path, received=type(loaded).__name__)
        repository = Repository(str(path.parent))
        repository.require(path.name)  # whoever watches the files hears of this one, too
        super().__init__(repository, dict.fromkeys(tensors, path.name))
        self._opened[path.name] = tensors


def _open_vae(source: str | None, *, pipeline: Repository | None) -> tuple[dict[str, Any], CheckpointTensors]:
    """The VAE of the pipeline, or that of a repository of its own or of another pipeline."""
    if source is None:
        assert pipeline is not None
        repository, folder = pipeline, "vae"
    else:
        repository = Repository(source)
        folder = "" if repository.find("vae/config.json") is None else "vae"
    vae = repository.json(f"{folder}/config.json".lstrip("/"))
    _require_keys(vae, _VAE_KEYS, f"{repository.source}/{folder}/config.json", "an SD VAE")
    return vae, repository.tensors(folder)


def _require_keys(described: Mapping[str, Any], keys: tuple[str, ...], where: str, what: str) -> None:
    """UserError if a configuration lacks what every network of its kind states: it is another kind."""
    missing = [key for key in keys if key not in described]
    if missing:
        raise UserError(
            f"not {what}: {missing[0]} is missing",
            where=where,
            received=described.get("_class_name"),
            hint="set teacher.source to a DiT pipeline, an original DiT file or a DINOv2 (docs/teachers.md)",
        )


def _open_dino(config: TeacherConfig, repository: Repository, family: str) -> _OpenedDino:
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    with naming(config.source):
        config.require_family("dinov2")
    described = (Dinov2Config if family == _DINOV2 else Dinov2WithRegistersConfig).from_dict(
        repository.json("config.json")
    )
    return _OpenedDino(
        family,
        described,
        None if config.random_seed is not None else repository.tensors(),
        _crop_size_px(repository),
        _pixel_statistics(repository, IMAGENET_PIXELS),
    )


def _random_digest(seed: int, described: Mapping[str, Any]) -> str:
    """Stands for weights that follow from a seed and an architecture."""
    architecture = json.dumps(described, sort_keys=True, default=str)
    return f"random {seed} {hashlib.sha256(architecture.encode()).hexdigest()}"


# --- how a network sees its pixels

_PREPROCESSOR = "preprocessor_config.json"


def _preprocessor(repository: Repository) -> dict[str, Any]:
    return {} if repository.find(_PREPROCESSOR) is None else repository.json(_PREPROCESSOR)


def _pixel_statistics(repository: Repository, otherwise: PixelStatistics) -> PixelStatistics:
    """Mean and deviation as the checkpoint states them.

    Raises:
        UserError: they are not three numbers each.
    """
    stated = _preprocessor(repository)

    def three(name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        values = stated.get(name, default)
        try:
            red, green, blue = map(float, values)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name} is not three numbers",
                where=f"{repository.source}/{_PREPROCESSOR}",
                received=values,
                hint="download the file again",
            ) from error
        return red, green, blue

    return PixelStatistics(three("image_mean", otherwise.mean), three("image_std", otherwise.std))


def _crop_size_px(repository: Repository) -> int:
    """Side of a DINOv2's picture: what its processor crops to, which is not what its table of positions is for."""
    stated = _preprocessor(repository).get("crop_size", _DINO_SIZE_PX)
    if isinstance(stated, dict):
        stated = stated.get("height", stated.get("shortest_edge", _DINO_SIZE_PX))
    return int(stated)
