"""The original DiT checkpoint, `DiT-XL-2-256x256.pt`, seen through diffusers' names (docs/teachers.md)."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from model.frozen import TensorView

# The sizes that DiT publishes (S, B, L, XL): heads cannot be read off the tensors: they only divide the width.
HEADS_BY_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}

_EMBEDDINGS = {"pos_embed.proj.": "x_embedder.proj."}
# diffusers keeps a copy of the embedders of timestep and class in every block.
_SHARED = {
    "norm1.emb.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "norm1.emb.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
}
_CLASS_TABLE = ("norm1.emb.class_embedder.embedding_table.weight", "y_embedder.embedding_table.weight")
_OF_A_BLOCK = {
    "norm1.linear.": "adaLN_modulation.1.",
    "attn1.to_out.0.": "attn.proj.",
    "ff.net.0.proj.": "mlp.fc1.",
    "ff.net.2.": "mlp.fc2.",
}
_ATTENTION = ("attn1.to_q.", "attn1.to_k.", "attn1.to_v.")  # the thirds of `attn.qkv`, in its order
_BOTH = ("weight", "bias")


def original_dit_config(tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """What diffusers would write into `transformer/config.json`, from the shapes of the tensors.

    Args:
        heads: attention heads; None looks the width up among the published sizes.

    Raises:
        ValueError: not a DiT, or a width that is no published size's and no `heads`.
    """
    embedder, classes, positions = (
        _shape(tensors, name) for name in ("x_embedder.proj.weight", _CLASS_TABLE[1], "pos_embed")
    )
    if (len(embedder), len(classes), len(positions)) != (4, 2, 3):
        raise ValueError(
            f"not an original DiT checkpoint: x_embedder, class table, pos_embed {embedder, classes, positions}"
        )
    width, channels, patch, _ = embedder
    heads = heads or HEADS_BY_WIDTH.get(width)
    if heads is None or width % heads:
        sizes = ", ".join(map(str, HEADS_BY_WIDTH))
        raise ValueError(f"a DiT of width {width} (published: {sizes}): set teacher.heads to a divisor of the width")
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "patch_size": patch,
        "sample_size": math.isqrt(positions[1]) * patch,
        "num_layers": max(blocks, default=-1) + 1,
        "num_embeds_ada_norm": classes[0] - 1,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
    }


class DiffusersNames(TensorView):
    """A view of the first blocks of an original checkpoint under diffusers' names, reading lazily.

    Attributes:
        originals: names in the file of all that is shown.

    Raises:
        ValueError: the checkpoint lacks tensors of these blocks; they are named as in the file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], blocks: int) -> None:
        stored = dict(_names(blocks))
        super().__init__({mine: partial(_read, tensors, *place) for mine, place in stored.items()})
        self.originals = sorted({name for name, _third in stored.values()})
        missing = [name for name in self.originals if name not in tensors]
        if missing:
            raise ValueError(f"checkpoint lacks {len(missing)} tensor(s) of the DiT: " + ", ".join(missing[:5]))


def _read(tensors: Mapping[str, Tensor], name: str, third: int | None) -> Tensor:
    return tensors[name] if third is None else tensors[name].chunk(3)[third]


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"not an original DiT checkpoint: it has no tensor {name}")
    return tuple(tensors[name].shape)


def _names(blocks: int) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """Every diffusers name with the original's name and which third of its rows."""
    for mine, original in _EMBEDDINGS.items():
        for kind in _BOTH:
            yield mine + kind, (original + kind, None)
    for index in range(blocks):
        block = f"transformer_blocks.{index}."
        yield block + _CLASS_TABLE[0], (_CLASS_TABLE[1], None)
        for kind in _BOTH:
            for mine, original in _SHARED.items():
                yield block + mine + kind, (original + kind, None)
            for mine, original in _OF_A_BLOCK.items():
                yield block + mine + kind, (f"blocks.{index}.{original}{kind}", None)
            for third, mine in enumerate(_ATTENTION):
                yield block + mine + kind, (f"blocks.{index}.attn.qkv.{kind}", third)
