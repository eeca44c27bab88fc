"""Whether the frozen networks at their sources are still those that a cache was made with, as far as they are here.

Stage 2 needs neither the encoder's weights nor the teacher's, so they need not be on the machine that trains. Where
they are, a cache made with others is refused: a new video would be answered from features of another kind than those
that training saw. Nothing is fetched or made for it, and what was read once is remembered (`stages.frozen.source`).
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from stages.cache.files.places import Place
from stages.cache.fingerprint import Fingerprint
from stages.errors import UserError
from stages.frozen.identity import checkpoint_fields
from stages.frozen.load import describe_encoder, describe_teacher, teacher_sources
from stages.frozen.source import FrozenSource
from stages.weights.repository import BUNDLED_PREFIX

_LOG = logging.getLogger(__name__)
_SHOWN_CHARS = 12


def require_same_weights(config: ModelConfig, fingerprint: Fingerprint, cache: Place, *, with_teacher: bool) -> None:
    """Stop if the encoder or the teacher on this machine is not the one that a cache was made with.

    Args:
        config: which networks; their settings fit the fingerprint (`stages.frozen.identity.feature_fields`).

    Raises:
        UserError: naming the first fact that differs.
    """
    encoder, teacher = config.encoder, config.teacher
    found = {"encoder": _here("encoder", encoder, {"source": encoder.source}, describe_encoder)}
    if with_teacher:
        found["teacher"] = _here("teacher", teacher, teacher_sources(teacher), describe_teacher)
    for part, described in found.items():
        if described is None:
            continue
        for name, now in checkpoint_fields(part, described).items():
            then = fingerprint.fields.get(name, now)
            if then != now:
                raise UserError(
                    f"no longer the network that the cache at {cache} was made with: {name} differs",
                    where=f"{part}.source {getattr(config, part).source}",
                    received=_short(now),
                    allowed=repr(_short(then)),
                    hint="put back what was there, or extract with what is there now into another --cache directory",
                )


def _short(value: object) -> object:
    """A digest by its beginning, and that of each network if it is made of two."""
    if not isinstance(value, str) or len(value) <= 2 * _SHOWN_CHARS:
        return value
    return "-".join(part[:_SHOWN_CHARS] for part in value.split("-"))


def _here(
    part: str, config: Any, sources: dict[str, str], describe: Callable[[Any], FrozenSource]
) -> FrozenSource | None:
    """The description of a network whose checkpoints are all on this machine."""
    places = {setting: _place(source) for setting, source in sources.items()}
    if None in places.values():
        return None
    try:
        return describe(config.model_copy(update=places))
    except UserError as error:
        # Of a checkpoint of several networks, the files of this one may not have been downloaded.
        _LOG.debug("whether the %s at %s is the cache's is unknown: %s", part, config.source, error)
        return None


def _place(source: str) -> str | None:
    """Where a checkpoint is on this machine; None if it would have to be fetched."""
    if source.startswith(BUNDLED_PREFIX) or Path(source).expanduser().exists():
        return source
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(source, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
