"""Checkpoints in the layout of LAVIS and MA-LMM (`.pth`), under the names that transformers gives the same tensors.

`_PARTS` and `_INSIDE` map the names. A file of MA-LMM's trainer holds what was trained and the buffers only
(MA-LMM:lavis/runners/runner_base.py:582-597); a full LAVIS file holds the visual tower and the language
model too, and a network can be filled from either with `load_named`.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.frozen import TensorView
from stages.errors import UserError
from stages.weights.repository import load_without_code

FRAME_POSITIONS = "image_pe.weight"
"""The temporal table of Eq. 1; it has no counterpart in transformers and keeps its name."""

# Beginnings of names: LAVIS's, and transformers'.
_PARTS = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    ("ln_vision.", "vision_model.post_layernorm."),
    ("query_tokens", "query_tokens"),
    ("Qformer.bert.", "qformer."),
    ("llm_proj.", "language_projection."),
    ("llm_model.", "language_model."),
    (FRAME_POSITIONS, FRAME_POSITIONS),
)
# What differs further on in a name, by its beginning.
_INSIDE = {
    "vision_model.": (
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".attn.proj.", ".self_attn.projection."),
    ),
    # Cross-attention has the second one as well.
    "qformer.": (("embeddings.LayerNorm.", "embeddings.layernorm."), ("attention.self.", "attention.attention.")),
}
# LAVIS stores the biases of queries and values; that of the keys is zero by construction.
_HALF_BIAS = re.compile(r"^visual_encoder\.blocks\.(\d+)\.attn\.[qv]_bias$")


class LavisTensors(TensorView):
    """The tensors of a LAVIS state dict by transformers' names; what has no such name is not shown."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self.stored = stored
        self._sources: dict[str, tuple[str, ...]] = {}
        for name in stored:
            half = _HALF_BIAS.match(name)
            if half:
                block = f"visual_encoder.blocks.{half[1]}.attn"
                joined = f"vision_model.encoder.layers.{half[1]}.self_attn.qkv.bias"
                self._sources[joined] = (f"{block}.q_bias", f"{block}.v_bias")
            elif (translated := translate(name)) is not None:
                self._sources[translated] = (name,)
        super().__init__({name: partial(self._join, sources) for name, sources in self._sources.items()})

    def stored_names(self, names: Iterable[str]) -> set[str]:
        """The file's own names of these tensors."""
        return {stored for name in names for stored in self._sources[name]}

    def _join(self, sources: tuple[str, ...]) -> Tensor:
        parts = [self.stored[stored] for stored in sources]
        if len(parts) == 1:
            return parts[0]
        query, value = parts
        return torch.cat([query, torch.zeros_like(query), value])


def translate(name: str) -> str | None:
    """transformers' name for a tensor of LAVIS; None where it has none (the BERT head, position counters)."""
    if name.endswith(".position_ids"):
        return None
    for theirs, ours in _PARTS:
        if name.startswith(theirs):
            translated = ours + name.removeprefix(theirs)
            break
    else:
        return None
    for beginning, changes in _INSIDE.items():
        if translated.startswith(beginning):
            for old, new in changes:
                translated = translated.replace(old, new)
    return translated


def open_lavis(path: Path) -> LavisTensors:
    """Open a `.pth` of LAVIS or MA-LMM: a state dict, or a dictionary that holds one under `model`.

    Raises:
        UserError: the file is damaged, holds objects beside the tensors, or holds no tensors by name.
    """
    loaded = load_without_code(path, hint=_extraction_hint(path))
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    named = state if isinstance(state, dict) else {}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(
            "holds no tensors by name",
            where=path,
            allowed="a state dict, or a dictionary with one under 'model'",
        )
    return LavisTensors(tensors)


def _extraction_hint(path: Path) -> str:
    """The command that writes only the tensors; it runs whatever the file brings along."""
    bare = path.with_name(f"{path.stem}-model.pth")
    code = (
        f'import torch; state = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False); '
        f'torch.save({{"model": state["model"]}}, {json.dumps(str(bare))})'
    )
    return (
        "if you trust whoever made it (this runs the code in it), write only its tensors with "
        f"`python -c {shlex.quote(code)}` and name {bare.name} instead"
    )
