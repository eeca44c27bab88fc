"""The frozen visual encoder over uint8 frames: a vision tower of InstructBLIP or CLIP (paper section 3.1)."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, InstructBlipVisionConfig, InstructBlipVisionModel

from model.config import EncoderConfig
from model.frozen import FrozenModule, load_named
from model.pixels import PixelStatistics

# Standard deviation of random weights: that of vision transformers in transformers, but for InstructBLIP's, whose 1e-10
# makes every block the identity.
_RANDOM_STD = 0.02


class VisionEncoder(FrozenModule):
    """Patch features of single frames; the layers above the one that is read are never built.

    Without a `layer`, the features are those that the class of transformers calls `last_hidden_state`: InstructBLIP's
    with its final LayerNorm (frozen here; docs/checkpoints.md), CLIP's without one, because CLIP normalises nothing but
    the pooled class token. With a `layer` they are that block's output as it is.

    Args:
        config: which layer is read.
        vision_config: of the tower; its class decides which is built.
        tensors: the checkpoint's tensors by name; only those needed, all of whose names begin with `prefix`, are read,
            none for a tower with random weights.
        prefix: `vision_model.` in every checkpoint but that of a bare CLIP vision model.
        pixels: how the tower was trained to see its pixels.
        random_seed: of random weights in place of the tensors; None for those of the tensors.

    Raises:
        ValueError: the tower has fewer layers, or a tensor is missing or misshapen; the message names it.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        vision_config: InstructBlipVisionConfig | CLIPVisionConfig,
        tensors: Mapping[str, Tensor],
        prefix: str,
        pixels: PixelStatistics,
        random_seed: int | None = None,
    ) -> None:
        super().__init__()
        config.require_fits(vision_config.num_hidden_layers)
        layers = config.layer or vision_config.num_hidden_layers
        self.pixels = pixels
        if random_seed is None:
            truncated = copy.deepcopy(vision_config)
            truncated.num_hidden_layers = layers
            self.vision_model = _build(truncated)
        else:
            self.vision_model = _draw(vision_config, layers, random_seed)
        if isinstance(vision_config, CLIPVisionConfig) or config.layer is not None:
            self.vision_model.post_layernorm = nn.Identity()
        if random_seed is None:
            load_named(self.vision_model, tensors, prefix=prefix)
        self.freeze()

    @property
    def size_px(self) -> int:
        """Side of the square input picture in pixels."""
        return int(self.vision_model.config.image_size)

    @property
    def width(self) -> int:
        """C, width of the features."""
        return int(self.vision_model.config.hidden_size)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Frames [T, S, S, 3] uint8 RGB -> features [T, P, C] in the network's dtype; P counts the class token."""
        pixels = self.pixels.normalise(frames)
        features: Tensor = self.vision_model(pixels.to(self.vision_model.dtype)).last_hidden_state
        return features


def _build(vision_config: InstructBlipVisionConfig | CLIPVisionConfig) -> CLIPVisionModel | InstructBlipVisionModel:
    is_clip = isinstance(vision_config, CLIPVisionConfig)
    network: CLIPVisionModel | InstructBlipVisionModel = (CLIPVisionModel if is_clip else InstructBlipVisionModel)(
        vision_config
    )
    return network


def _draw(
    vision_config: InstructBlipVisionConfig | CLIPVisionConfig, layers: int, seed: int
) -> CLIPVisionModel | InstructBlipVisionModel:
    """The first layers of a tower with transformers' own random weights: the same, however many are kept."""
    whole = copy.deepcopy(vision_config)
    whole.initializer_range = max(_RANDOM_STD, vision_config.initializer_range)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build(whole)
    # Cut afterwards: CLIP's deviation follows from the number of layers of the whole tower.
    network.encoder.layers = network.encoder.layers[:layers]
    return network
