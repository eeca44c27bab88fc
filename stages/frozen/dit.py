"""DiT teachers with their VAE, from diffusers' pipelines or original files, opened but not loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model.config import DiTSettings
from stages.cache.fingerprint import Scalar
from stages.errors import UserError
from stages.frozen.source import FrozenSource, random_digest
from stages.weights.dit_original import DiffusersNames, original_dit_config
from stages.weights.instructblip import naming
from stages.weights.repository import CheckpointTensors, LoadingReport, Repository, load_without_code
from stages.weights.whole_files import Needs

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

_ORIGINAL_SUFFIXES = (".pt", ".pth")
# The VAE that DiT's own sampler takes by default; original files hold none.
_ORIGINAL_VAE = "stabilityai/sd-vae-ft-mse"


@dataclass(frozen=True)
class OpenedDiT:
    """A DiT's configuration; its VAE and the weights of both are looked for when they are asked for.

    Attributes:
        dit: diffusers' `transformer/config.json`, or the same deduced from an original file.
        pipeline: where the transformer is; None for an original file.
        original: the tensors of an original file, by its names.
    """

    config: DiTSettings
    dit: Mapping[str, Any]
    pipeline: Repository | None = None
    original: CheckpointTensors | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are pooled: the patches of the latent."""
        return int(self.dit["sample_size"] // self.dit["patch_size"]) ** 2

    @property
    def width(self) -> int:
        """D."""
        return int(self.dit["num_attention_heads"] * self.dit["attention_head_dim"])

    @property
    def size_px(self) -> int:
        return int(self.dit["sample_size"] * 2 ** (len(self._vae[0]["block_out_channels"]) - 1))

    @cached_property
    def _vae(self) -> tuple[dict[str, Any], CheckpointTensors]:
        """`config.json` and tensors of the VAE: the pipeline's, another pipeline's, or one with its own source."""
        source = dit_sources(self.config).get("vae_source")
        repository = Repository(source or self.config.source)
        folder = "vae" if source is None else _vae_folder(repository)
        vae = repository.json(f"{folder}/config.json".lstrip("/"))
        _require_keys(vae, _VAE_KEYS, f"{repository.source}/{folder}/config.json", "an SD VAE")
        return vae, repository.tensors(folder)

    @cached_property
    def tensors(self) -> CheckpointTensors | None:
        """Of the transformer; none are needed for random weights."""
        if self.original is not None or self.config.random_seed is not None or self.pipeline is None:
            return self.original
        return self.pipeline.tensors("transformer")

    def describe(self) -> FrozenSource:
        """Input size, digest of what is read, and what the checkpoint states; UserError if it is no such network."""
        if self.config.random_seed is not None:
            digest = random_digest(self.config.random_seed, self.dit)
        else:
            assert self.tensors is not None
            blocks = (f"transformer_blocks.{index}." for index in range(self.config.block))
            shown = ("pos_embed.", *blocks) if self.original is None else self._shown().originals
            digest = self.tensors.digest(shown)
        facts: dict[str, Scalar] = {"family": "dit", "latent": "posterior mode", "pooling": "mean over tokens"}
        digest = f"{digest}-{self._vae[1].digest(_VAE_PREFIXES)}"
        return FrozenSource(self.size_px, digest, facts, self.loading())

    def load(self) -> "Teacher":
        from model.teachers.dit import DiTTeacher

        tensors: Mapping[str, Tensor] = {}
        if self.config.random_seed is None:
            assert self.tensors is not None
            tensors = self.tensors if self.original is None else self._shown()
        vae, vae_tensors = self._vae
        return DiTTeacher(
            self.config, dit_config=self.dit, dit_tensors=tensors, vae_config=vae, vae_tensors=vae_tensors
        )

    def loading(self) -> tuple[LoadingReport, ...]:
        return tuple(tensors.loading() for tensors in (self.tensors, self._vae[1]) if tensors is not None)

    def _shown(self) -> DiffusersNames:
        assert self.original is not None
        return DiffusersNames(self.original, self.config.block)


def open_dit(config: DiTSettings) -> OpenedDiT:
    """Look into a pipeline in diffusers' layout, or into one of DiT's own files, which names no VAE.

    Raises:
        UserError: it is neither, or a setting does not fit it.
    """
    if is_original(config.source):
        path = Path(config.source).expanduser()
        if not path.is_file():
            raise UserError("no such file", where="teacher.source", received=config.source)
        tensors = _OriginalTensors(path)
        with naming(config.source):
            opened = OpenedDiT(config, original_dit_config(tensors, config.heads), original=tensors)
    else:
        repository = Repository(config.source)
        dit = repository.json("transformer/config.json")
        _require_keys(dit, _DIT_KEYS, f"{repository.source}/transformer/config.json", "a DiT")
        if config.heads is not None:
            raise UserError(
                "only an original DiT file needs it; transformer/config.json has the number of heads",
                where="teacher.heads",
                received=config.heads,
                allowed="null",
            )
        opened = OpenedDiT(config, dit, pipeline=repository)
    with naming(config.source):
        config.require_fits(opened.dit)
    return opened


def is_original(source: str) -> bool:
    """Whether this names one of DiT's own files."""
    return source.endswith(_ORIGINAL_SUFFIXES)


def is_dit(source: str) -> bool:
    """Whether this is a DiT, from either origin."""
    return is_original(source) or Repository(source).find("transformer/config.json") is not None


def dit_sources(config: DiTSettings) -> dict[str, str]:
    """The checkpoints that are read: the DiT's, and the VAE's if that is another."""
    vae = config.vae_source or (_ORIGINAL_VAE if is_original(config.source) else None)
    return {"source": config.source, **({} if vae is None else {"vae_source": vae})}


def dit_needs(config: DiTSettings) -> dict[str, Needs | None]:
    """What is read of each of `dit_sources`; None for an original file, which is read whole."""
    sources = dit_sources(config)
    if "vae_source" not in sources:
        return {"source": Needs(("transformer/config.json", "vae/config.json"), ("transformer", "vae"))}
    dit = None if is_original(config.source) else Needs(("transformer/config.json",), ("transformer",))
    vae = Repository(sources["vae_source"])
    try:
        folder = _vae_folder(vae)
    except UserError:  # a git-lfs pointer in its place, or it is not here
        folder = "" if vae.folder is None else "vae"
    return {"source": dit, "vae_source": Needs(("vae/config.json",), ("vae",)) if folder else Needs(("config.json",))}


def _vae_folder(repository: Repository) -> str:
    return "" if repository.find("vae/config.json") is None else "vae"


class _OriginalTensors(CheckpointTensors):
    """The tensors of an original DiT file: as published, or the moving average of one that DiT's training wrote."""

    def __init__(self, path: Path) -> None:
        loaded = load_without_code(path, hint="save only its moving average: torch.save(checkpoint['ema'], path)")
        tensors = loaded.get("ema", loaded) if isinstance(loaded, dict) else None
        if not isinstance(tensors, dict):
            raise UserError("holds no tensors by name", where=path, received=type(loaded).__name__)
        repository = Repository(str(path.parent))
        repository.require(path.name)  # whoever watches the files hears of this one, too
        super().__init__(repository, dict.fromkeys(tensors, path.name))
        self._opened[path.name] = tensors


def _require_keys(described: Mapping[str, Any], keys: tuple[str, ...], where: str, what: str) -> None:
    """UserError if a configuration lacks what every network of its kind states: it is another kind."""
    missing = [key for key in keys if key not in described]
    if missing:
        raise UserError(
            f"not {what}: {missing[0]} is missing",
            where=where,
            received=described.get("_class_name"),
            hint="set teacher.source to a DiT pipeline or an original DiT file, or teacher.kind to another family",
        )
