"""What every reader of an InstructBLIP checkpoint needs: its configuration, and errors that name it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stages.errors import UserError
from stages.weights import Repository

if TYPE_CHECKING:
    from transformers import InstructBlipConfig, PretrainedConfig

INSTRUCTBLIP = "instructblip"


def is_instructblip(repository: Repository) -> bool:
    """Whether the repository's `config.json` is that of an InstructBLIP."""
    return repository.json("config.json").get("model_type") == INSTRUCTBLIP


def instructblip_config(repository: Repository) -> "InstructBlipConfig":
    """The repository's configuration, complete: published files leave out what equals transformers' defaults.

    Raises:
        UserError: the repository describes another kind of network.
    """
    from transformers import InstructBlipConfig

    described = repository.json("config.json")
    if not is_instructblip(repository):
        raise UserError(
            "not an InstructBLIP checkpoint",
            where=repository.source,
            received=described.get("model_type"),
            allowed=f"config.json with model_type {INSTRUCTBLIP}",
            hint="set the source to an InstructBLIP folder or hub id",
        )
    return InstructBlipConfig.from_dict(described)


def language_config(repository: Repository) -> "PretrainedConfig":
    """Configuration of the repository's language model: an InstructBLIP's, or that of one of transformers' own.

    Raises:
        UserError: the configuration describes nothing that transformers knows.
    """
    from transformers import AutoConfig

    if is_instructblip(repository):
        return instructblip_config(repository).text_config
    try:
        return AutoConfig.from_pretrained(repository.folder or repository.source).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no language model: {reason}", where=repository.source) from error


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Turn a checkpoint that does not fit into one line that names it."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=source) from error
