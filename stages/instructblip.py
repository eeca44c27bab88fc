"""What every reader of an InstructBLIP checkpoint needs: its configuration, and errors that name it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stages.errors import UserError
from stages.weights import Repository

if TYPE_CHECKING:
    from transformers import InstructBlipConfig

INSTRUCTBLIP = "instructblip"


def instructblip_config(repository: Repository) -> "InstructBlipConfig":
    """The repository's configuration, complete: published files leave out what equals transformers' defaults.

    Raises:
        UserError: the repository describes another kind of network.
    """
    from transformers import InstructBlipConfig

    described = repository.json("config.json")
    if described.get("model_type") != INSTRUCTBLIP:
        raise UserError(
            "not an InstructBLIP checkpoint",
            where=repository.source,
            received=described.get("model_type"),
            allowed=f"config.json with model_type {INSTRUCTBLIP}",
            hint="set the source to an InstructBLIP folder or hub id",
        )
    return InstructBlipConfig.from_dict(described)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Turn a checkpoint that does not fit into one line that names it."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=source) from error
