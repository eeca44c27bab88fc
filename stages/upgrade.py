"""Settings that earlier versions stored under other names: in runs, exports and fingerprints of caches.

Up to version 0.1.0 the teacher had no kind: its checkpoint decided, and each family's settings had names of their own.
Fingerprint files keep those names, so that a cache's digest, which its runs and commit records hold, stays what it was.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KIND, _SOURCE = "teacher.kind", "teacher.source"
# Of each kind: what a setting was called, what it is called, and its default then.
_FORMER: dict[str, dict[str, tuple[str, Any]]] = {
    "dit": {
        "teacher.block": ("teacher.block", 8),
        "teacher.timestep": ("teacher.timestep", 0),
        "teacher.timestep_embedding": ("teacher.timestep_embedding", "original"),
        "teacher.class_label": ("teacher.class_label", None),
        "teacher.vae_source": ("teacher.vae_source", None),
        "teacher.heads": ("teacher.heads", None),
    },
    "dinov2": {
        "teacher.dino_block": ("teacher.block", None),
        "teacher.dino_pooling": ("teacher.pooling", "mean"),
    },
    "tower": {
        "teacher.tower_block": ("teacher.block", None),
        "teacher.tower_pooling": ("teacher.pooling", "mean"),
    },
}
_DEFAULTS = {old: default for names in _FORMER.values() for old, (_new, default) in names.items()}

_PART = "train.micro_batch_size"
_TRAINING = {"train.workers": "train.loader_workers", "train.frames_per_run": "train.frames_per_chunk"}

RENAMED = _TRAINING | {
    old: f"{new} with {_KIND}={kind}"
    for kind, names in _FORMER.items()
    for old, (new, _default) in names.items()
    if old != new
}
"""What to write in place of a key that is no longer taken."""


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings by dotted key, whole and of whichever version, under the names of this version."""
    settings = {_TRAINING.get(key, key): value for key, value in settings.items()}
    if settings.get(_PART, "") is None:  # all of a batch at once, which auto does where that fits
        settings[_PART] = "auto"
    if _KIND in settings or not {_SOURCE, *_DEFAULTS} <= settings.keys():
        return settings
    kind = _kind_of(settings)
    dropped = _DEFAULTS.keys() - _FORMER[kind].keys()
    names = {old: new for old, (new, _default) in _FORMER[kind].items()}
    return {_KIND: kind, **{names.get(key, key): value for key, value in settings.items() if key not in dropped}}


def as_first_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `upgraded`; settings of a kind that version 0.1.0 did not know stay as they are."""
    names = _FORMER.get(settings.get(_KIND, ""))
    if names is None:
        return dict(settings)
    mine = {new: old for old, (new, _default) in names.items()}
    renamed = {mine.get(key, key): value for key, value in settings.items() if key != _KIND}
    return {**{old: default for old, default in _DEFAULTS.items() if old not in mine.values()}, **renamed}


def _kind_of(settings: Mapping[str, Any]) -> str:
    """The kind that settings without one are of: by what only one kind read, else by what the checkpoint is."""
    for kind, names in _FORMER.items():
        if kind != "dit" and any(settings[old] != default for old, (_new, default) in names.items()):
            return kind
    source = str(settings[_SOURCE])
    # As a fingerprint states it; of a checkpoint that is not here its name is all there is.
    family = settings.get("teacher.family") or _model_type(Path(source).expanduser()) or Path(source).name.lower()
    if "dinov2" in family:
        return "dinov2"
    return "tower" if "clip" in family or "blip" in family else "dit"


def _model_type(folder: Path) -> str | None:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # a DiT pipeline has none there
    return content.get("model_type") if isinstance(content, dict) else None
