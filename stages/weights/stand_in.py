"""A folder in the place of a checkpoint: its configuration and tokenizers, its shapes, and random weights.

What is on this machine is taken from there. Of published checkpoints that are not, the configuration is known
(`stages.weights.published`), and the tokenizers of the bundled tiny networks take the place of theirs.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.weights.published import published, tensor_shapes
from stages.weights.random import RANDOM_FILE
from stages.weights.repository import BUNDLED_PREFIX, Repository, local_only
from stages.weights.whole_files import TOKENIZER_FILES

_CONFIG = "config.json"
_COMPONENTS = ("", "transformer/", "vae/")
_TOKENIZERS = ("", "qformer_tokenizer/")
_PIXELS = "preprocessor_config.json"
_WORDS = Repository(f"{BUNDLED_PREFIX}tiny-instructblip")


def write_stand_in(source: str, folder: Path, *, language_layers: int | None = None) -> None:
    """Write a checkpoint of the same shapes as `source`, with random weights; nothing is fetched.

    Args:
        source: folder, hub id, or `bundled:NAME`.
        folder: a new one.
        language_layers: layers that are kept of a language model; None: all.

    Raises:
        UserError: the checkpoint is neither on this machine nor known.
    """
    with local_only():
        repository, configurations = Repository(source), _configurations(source)
        for name, described in configurations.items():
            kept = described if language_layers is None else _cut(described, language_layers)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept), encoding="utf-8")
            (path.parent / RANDOM_FILE).write_text(json.dumps(tensor_shapes(kept)), encoding="utf-8")
        if _CONFIG in configurations:
            _copy_tokenizers(repository, folder)


def _configurations(source: str) -> Mapping[str, Mapping[str, Any]]:
    """Content of the configuration of every component, by file name."""
    repository = Repository(source)
    try:
        here = [name for folder in _COMPONENTS if repository.find(name := f"{folder}{_CONFIG}") is not None]
    except UserError:  # of the hub, and not on this machine
        here = []
    return {name: repository.json(name) for name in here} or published(source).configurations


def _cut(described: Mapping[str, Any], layers: int) -> Mapping[str, Any]:
    """The configuration with fewer layers of the language model: that of an InstructBLIP, or the whole network."""
    if "text_config" in described:
        return {**described, "text_config": {**described["text_config"], "num_hidden_layers": layers}}
    return {**described, "num_hidden_layers": layers} if "vocab_size" in described else described


def _copy_tokenizers(repository: Repository, folder: Path) -> None:
    for place in _TOKENIZERS:
        own = {name: path for name in TOKENIZER_FILES if (path := _find(repository, f"{place}{name}")) is not None}
        others = {name: path for name in TOKENIZER_FILES if (path := _WORDS.find(f"{place}{name}")) is not None}
        (folder / place).mkdir(exist_ok=True)
        for name, path in (own or others).items():
            shutil.copyfile(path, folder / place / name)
    if (pixels := _find(repository, _PIXELS)) is not None:
        shutil.copyfile(pixels, folder / _PIXELS)


def _find(repository: Repository, name: str) -> Path | None:
    try:
        return repository.find(name)
    except UserError:
        return None
