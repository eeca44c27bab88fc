"""DiT teachers with their VAE, from diffusers' pipelines or original files, opened but not loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model.config import TeacherConfig
from stages.cache.fingerprint import Scalar
from stages.errors import UserError
from stages.frozen.source import FrozenSource, random_digest
from stages.weights.dit_original import DiffusersNames, original_dit_config
from stages.weights.instructblip import naming
from stages.weights.repository import CheckpointTensors, LoadingReport, Repository, load_without_code

if TYPE_CHECKING:
    from model.teachers.base import Teacher

# What such a network's configuration states.
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
# What the VAE reads from its checkpoint, by name: the digest in the cache's fingerprint covers just this.
_VAE_PREFIXES = ("encoder.", "quant_conv.")

ORIGINAL_SUFFIXES = (".pt", ".pth")
# The VAE that DiT's own sampler takes by default; original files hold none.
ORIGINAL_VAE = "stabilityai/sd-vae-ft-mse"


@dataclass(frozen=True)
class OpenedDiT:
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
        """Input size, digest of what is read, and what the checkpoint says; UserError if settings do not fit."""
        config.require_fits(self.dit)
        if config.random_seed is not None:
            digest = random_digest(config.random_seed, self.dit)
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
        """Build the network with its weights."""
        from model.teachers.dit import DiTTeacher

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


def open_dit(config: TeacherConfig, repository: Repository) -> OpenedDiT:
    """Look into a pipeline in diffusers' layout; UserError if it is none, or a setting does not belong to one."""
    dit = repository.json("transformer/config.json")
    _require_keys(dit, _DIT_KEYS, f"{repository.source}/transformer/config.json", "a DiT")
    if config.heads is not None:
        raise UserError(
            "only an original DiT file needs it; transformer/config.json has the number of heads",
            where="teacher.heads",
            received=config.heads,
            allowed="null",
        )
    tensors = None if config.random_seed is not None else repository.tensors("transformer")
    return OpenedDiT(dit, tensors, False, *_open_vae(config.vae_source, pipeline=repository))


def open_original_dit(config: TeacherConfig) -> OpenedDiT:
    """Look into one of DiT's own files, which name no VAE; UserError if it is none."""
    path = Path(config.source).expanduser()
    if not path.is_file():
        raise UserError("no such file", where="teacher.source", received=config.source)
    tensors = _OriginalTensors(path)
    with naming(config.source):
        dit = original_dit_config(tensors, config.heads)
    return OpenedDiT(dit, tensors, True, *_open_vae(config.vae_source or ORIGINAL_VAE, pipeline=None))


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
            hint="set teacher.source to a DiT pipeline, an original DiT file, a DINOv2 or a vision tower",
        )
