"""What every reader of an InstructBLIP checkpoint needs: its configuration, and errors that name it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import UserError
from stages.weights.repository import Repository
from stages.weights.whole_files import refuse_pointer

if TYPE_CHECKING:
    from transformers import InstructBlipConfig, PretrainedConfig

INSTRUCTBLIP = "instructblip"
# So many characters of a library's message are shown.
_LONGEST_REASON = 300


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
    with loading("configuration", repository.source):
        return InstructBlipConfig.from_dict(described)


def language_config(repository: Repository) -> "PretrainedConfig":
    """Configuration of the repository's language model: an InstructBLIP's, or that of one of transformers' own.

    Raises:
        UserError: the configuration describes nothing that transformers knows.
    """
    from transformers import AutoConfig

    if is_instructblip(repository):
        return instructblip_config(repository).text_config
    with loading("language model", repository.source):
        return AutoConfig.from_pretrained(repository.folder or repository.source).get_text_config(decoder=True)


@contextmanager
def loading(what: str, source: str) -> Iterator[None]:
    """Turn whatever transformers raises over a checkpoint's files into one line that names them and what to do.

    Its exceptions are of many kinds (of huggingface_hub, tokenizers, safetensors and Python itself), and which one a
    fault gets changes from version to version.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        for path in sorted(Path(source).expanduser().glob("*.json")):
            refuse_pointer(path)  # whatever the library makes of one
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        raise UserError(
            f"no {what}: {kind}{reason}",
            where=source,
            hint="install the package that it asks for, or complete its files with `hf download` or `git lfs pull`",
        ) from error


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Turn a checkpoint that does not fit into one line that names it."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=source) from error
