"""A second family of teachers, DINOv2: is it diffusion that helps, or any second encoder?"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from model.config import DinoSettings
from model.frozen import load_named
from model.pixels import PixelStatistics
from model.teachers.base import Teacher


class DinoTeacher(Teacher):
    """Frames to targets y*: DINOv2's patch tokens, by default after its last block and LayerNorm, pooled.

    The blocks above the one that is read are never built. Class and register tokens stay out of the mean.

    Args:
        dino_config: of `Dinov2Model` or `Dinov2WithRegistersModel`.
        tensors: the network's tensors by name, published or today's; only those needed are read, none for a network
            with random weights.
        size_px: side of the square picture; the table of positions is interpolated to it, as DINOv2 does.
        pixels: how the network was trained to see its pixels.

    Raises:
        ValueError: the network has fewer blocks, patches do not fill the picture, or a tensor is missing or misshapen.
    """

    def __init__(
        self,
        config: DinoSettings,
        *,
        dino_config: Dinov2Config | Dinov2WithRegistersConfig,
        tensors: Mapping[str, Tensor],
        size_px: int,
        pixels: PixelStatistics,
    ) -> None:
        super().__init__()
        config.require_fits(dino_config.num_hidden_layers)
        if size_px % dino_config.patch_size:
            raise ValueError(f"pictures of {size_px} px do not consist of patches of {dino_config.patch_size} px")
        self.pooling, self.pixels = config.pooling, pixels
        self.size_px, self.width = size_px, int(dino_config.hidden_size)
        self.network: Any = _build(dino_config, config)
        self.special_tokens = 1 + getattr(dino_config, "num_register_tokens", 0)
        if config.random_seed is None:
            load_named(self.network, _TodaysNames(tensors))
        self.freeze()

    @torch.no_grad()
    def tokens(self, frames: Tensor) -> Tensor:
        """Frames [T, S, S, 3] uint8 RGB -> patch tokens [T, P', D], or the class token [T, 1, D]."""
        pixels = self.pixels.normalise(frames).to(self.network.dtype)
        hidden: Tensor = self.network(pixels).last_hidden_state
        return hidden[:, :1] if self.pooling == "class" else hidden[:, self.special_tokens :]


def _build(dino_config: Dinov2Config | Dinov2WithRegistersConfig, config: DinoSettings) -> Any:
    """The network up to the block that is read, with transformers' own random weights, drawn from the seed if any."""
    truncated = copy.deepcopy(dino_config)
    truncated.num_hidden_layers = config.block or dino_config.num_hidden_layers
    registers = isinstance(dino_config, Dinov2WithRegistersConfig)
    with torch.random.fork_rng(devices=[]):
        if config.random_seed is not None:
            torch.manual_seed(config.random_seed)
        network = (Dinov2WithRegistersModel if registers else Dinov2Model)(truncated)
    # Stands in for masked patches in pre-training only.
    network.embeddings.mask_token = None
    if config.block is not None:
        network.layernorm = nn.Identity()
    return network


# How published files name what transformers has renamed since; `weights_in` is two layers in one.
_PUBLISHED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
_HALVES = {"mlp.gate_proj": 0, "mlp.up_proj": 1}


class _TodaysNames(Mapping[str, Tensor]):
    """A view of a DINOv2 checkpoint under the names of today's transformers, reading lazily."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def _stored(self, name: str) -> tuple[str, int | None]:
        """Name in the file, and which half of its rows."""
        if name not in self._tensors:
            for today, published in _PUBLISHED.items():
                name = name.replace(f".{today}.", f".{published}.")
            for today, half in _HALVES.items():
                if f".{today}." in name:
                    return name.replace(f".{today}.", ".mlp.weights_in."), half
        return name, None

    def __getitem__(self, name: str) -> Tensor:
        stored, half = self._stored(name)
        tensor = self._tensors[stored]
        return tensor if half is None else tensor.chunk(2)[half]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored(name)[0] in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
