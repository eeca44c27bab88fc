"""What is known of published checkpoints without a network: configurations, bytes and licences.

The configurations hold what shapes follow from; all else has the defaults of the classes. Bytes are those of the
numbers, from these shapes and the type in which they are published; files have a header of some kilobytes more.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from stages.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# transformers' limit, by which the InstructBLIP was cut: 9.90, 9.96, 9.92 and 1.88 GB, as the hub shows them.
_SHARD_BYTES = 10 * 10**9


@dataclass(frozen=True)
class Published:
    """A repository of the hub.

    Attributes:
        licence: of the weights.
        configurations: content of the configuration files, by name; each has weights beside it.
        bytes_each: bytes of a published number.
    """

    licence: str
    configurations: Mapping[str, Mapping[str, Any]]
    bytes_each: int

    @property
    def vision(self) -> Mapping[str, Any] | None:
        """Configuration of the vision tower, if there is one."""
        tower: Mapping[str, Any] | None = self.configurations.get("config.json", {}).get("vision_config")
        return tower


def download_bytes(source: str, prefixes: Iterable[str]) -> int | None:
    """Bytes of a repository's files that hold tensors whose names begin with one of these, each file whole.

    None where nothing is known of the repository.
    """
    if source not in PUBLISHED:
        return None
    wanted = tuple(prefixes)
    return sum(sum(file.values()) for file in _weight_files(source) if any(name.startswith(wanted) for name in file))


@cache
def _weight_files(source: str) -> list[dict[str, int]]:
    """Bytes of each tensor, file by file, in the order in which the class has them."""
    files: list[dict[str, int]] = []
    for described in PUBLISHED[source].configurations.values():
        files.append({})
        for name, shape in tensor_shapes(described, tied=False).items():
            size = PUBLISHED[source].bytes_each * math.prod(shape)
            if files[-1] and sum(files[-1].values()) + size > _SHARD_BYTES:
                files.append({})
            files[-1][name] = size
    return files


def tensor_shapes(described: Mapping[str, Any], *, tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a network, by its name, from its configuration; nothing is allocated.

    Args:
        described: content of a `config.json` of transformers or diffusers.
        tied: whether a tensor that is another under a second name counts; a checkpoint's files leave it out.

    Raises:
        UserError: it describes nothing that these libraries know.
    """
    import torch
    from transformers.initialization import no_init_weights

    from stages.weights.instructblip import loading

    with loading("network", "config.json"), torch.device("meta"), no_init_weights():
        network = _build(described)
    left_out = () if tied else getattr(network, "all_tied_weights_keys", ())
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if name not in left_out}


def _build(described: Mapping[str, Any]) -> "nn.Module":
    network: nn.Module
    if "_class_name" in described:
        import diffusers

        # diffusers itself reads the DiT's older name so.
        name = {"Transformer2DModel": "DiTTransformer2DModel"}.get(described["_class_name"], described["_class_name"])
        network = getattr(diffusers, name).from_config(dict(described))
        return network
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, InstructBlipForConditionalGeneration

    config = AutoConfig.for_model(**described)
    if config.model_type == "instructblip":
        return InstructBlipForConditionalGeneration(config)
    has_words = type(config) in AutoModelForCausalLM._model_mapping
    network = (AutoModelForCausalLM if has_words else AutoModel).from_config(config)
    return network


INSTRUCTBLIP_VICUNA, DIT_XL, QWEN = (
    "Salesforce/instructblip-vicuna-7b",
    "facebook/DiT-XL-2-256",
    "Qwen/Qwen2.5-0.5B-Instruct",
)
PUBLISHED = {
    INSTRUCTBLIP_VICUNA: Published(
        "research only, under LLaMA's terms",
        {
            "config.json": {
                "model_type": "instructblip",
                "num_query_tokens": 32,
                "vision_config": {
                    "hidden_size": 1408,
                    "intermediate_size": 6144,
                    "num_hidden_layers": 39,
                    "num_attention_heads": 16,
                    "image_size": 224,
                    "patch_size": 14,
                },
                "qformer_config": {"vocab_size": 30_523},
                "text_config": {
                    "model_type": "llama",
                    "vocab_size": 32_064,
                    "hidden_size": 4096,
                    "intermediate_size": 11_008,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 32,
                    "rms_norm_eps": 1e-6,
                    "tie_word_embeddings": False,
                },
            }
        },
        bytes_each=4,
    ),
    DIT_XL: Published(
        "CC-BY-NC-4.0",
        {
            "transformer/config.json": {
                "_class_name": "Transformer2DModel",
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "num_layers": 28,
                "in_channels": 4,
                "out_channels": 8,
                "patch_size": 2,
                "sample_size": 32,
                "activation_fn": "gelu-approximate",
                "norm_type": "ada_norm_zero",
                "num_embeds_ada_norm": 1000,
                "attention_bias": True,
                "norm_elementwise_affine": False,
            },
            "vae/config.json": {
                "_class_name": "AutoencoderKL",
                "in_channels": 3,
                "out_channels": 3,
                "latent_channels": 4,
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "block_out_channels": [128, 256, 512, 512],
                "layers_per_block": 2,
                "act_fn": "silu",
                "norm_num_groups": 32,
                "sample_size": 256,
            },
        },
        bytes_each=4,
    ),
    QWEN: Published(
        "Apache-2.0",
        {
            "config.json": {
                "model_type": "qwen2",
                "vocab_size": 151_936,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1e6,
                "max_position_embeddings": 32_768,
                "tie_word_embeddings": True,
            }
        },
        bytes_each=2,
    ),
}
"""The repositories that the presets name, by hub id."""


def published(source: str) -> Published:
    """What is known of a repository; UserError where that is nothing."""
    if source not in PUBLISHED:
        raise UserError(
            "neither on this machine nor a published checkpoint whose shapes are known",
            where="checkpoint",
            received=source,
            allowed=", ".join(PUBLISHED),
            hint="name a folder that holds its config.json",
        )
    return PUBLISHED[source]
