"""Published checkpoints by hub id or local folder: configuration files, and tensors read one by one by name.

Only the shards that hold a wanted tensor are opened (or downloaded), and only the wanted tensors are read from them.
safetensors files are preferred; `.bin` and `.pt` files are read with `weights_only=True`, never as pickles.
"""

import hashlib
import json
import logging
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.frozen import TensorView
from stages.errors import UserError
from stages.weights.random import RANDOM_FILE, RandomTensors
from stages.weights.whole_files import WEIGHT_FILES, refuse_pointer, require_whole

_LOG = logging.getLogger(__name__)

BUNDLED_PREFIX = "bundled:"
# The tiny frozen networks that come with the project, in the layouts of the published checkpoints: `tiny-instructblip`
# holds a vision tower, an untrained Q-Former, a LLaMA and both tokenizers, `tiny-dit` a DiT pipeline. They let the
# whole path run without a download. The card beside each has how it was trained and what it knows.
BUNDLED = Path(__file__).with_name("bundled")
# What `Repository.find` was asked for and gave, by source and name, while somebody wants to know.
_WATCHED: ContextVar[dict[tuple[str, str], Path | None] | None] = ContextVar("watched", default=None)


@contextmanager
def watch_files() -> Iterator[dict[tuple[str, str], Path | None]]:
    """Collect which files of which repositories are looked for in the block, and where they were found."""
    seen: dict[tuple[str, str], Path | None] = {}
    token = _WATCHED.set(seen)
    try:
        yield seen
    finally:
        _WATCHED.reset(token)


# Whether the hub may not be asked, nor anything fetched from it.
_LOCAL_ONLY: ContextVar[bool] = ContextVar("local_only", default=False)


@contextmanager
def local_only() -> Iterator[None]:
    """Find the files of repositories only on this machine within the block: no connection is attempted."""
    token = _LOCAL_ONLY.set(True)
    try:
        yield
    finally:
        _LOCAL_ONLY.reset(token)


class Repository:
    """One model repository: a local folder, or a hub id whose files are fetched when asked for, see `local_only`.

    Args:
        source: folder, hub id, or `bundled:NAME`.
        hub: options of `hf_hub_download`, such as revision and token.
    """

    def __init__(self, source: str, hub: Mapping[str, Any] | None = None) -> None:
        self.source = source
        self._hub = hub or {}
        self.folder: Path | None = None
        if source.startswith(BUNDLED_PREFIX):
            name, names = source.removeprefix(BUNDLED_PREFIX), sorted(p.name for p in BUNDLED.iterdir() if p.is_dir())
            if name not in names:
                raise UserError("unknown bundled network", received=name, allowed=", ".join(names))
            self.folder = BUNDLED / name
        elif Path(source).expanduser().is_dir():
            self.folder = Path(source).expanduser()

    def find(self, name: str) -> Path | None:
        """Local path of file `name`, downloading it if need be; None if the repository has no such file.

        Raises:
            UserError: the hub cannot be reached and the file is not in its local cache; or the folder has a git-lfs
                pointer in its place.
        """
        path = self._find(name)
        if (watched := _WATCHED.get()) is not None:
            watched[self.source, name] = path
        return path

    def _find(self, name: str) -> Path | None:
        if self.folder is not None:
            path = self.folder / name
            if not path.is_file():
                return None
            refuse_pointer(path)
            return path
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

        try:
            if _LOCAL_ONLY.get():
                return self._find_here(name)
            return Path(hf_hub_download(self.source, name, **self._hub))
        except LocalEntryNotFoundError as error:
            # Without a network, what was downloaded is all there is: a file that it lacks is absent.
            if self._is_downloaded():
                return None
            raise self._unreachable() from error
        except EntryNotFoundError:
            return None
        except (OSError, HFValidationError, ValueError) as error:
            raise self._unreachable() from error

    def _find_here(self, name: str) -> Path | None:
        """In the hub's cache, by its files: `hf_hub_download` goes online even for `local_files_only`."""
        from huggingface_hub import try_to_load_from_cache

        where = {key: self._hub[key] for key in ("cache_dir", "revision") if key in self._hub}
        found = try_to_load_from_cache(self.source, name, **where)
        if isinstance(found, str):
            return Path(found)
        if self._is_downloaded():
            return None
        raise self._unreachable()

    def _is_downloaded(self) -> bool:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            snapshot_download(self.source, **{**self._hub, "local_files_only": True})
        except LocalEntryNotFoundError:
            return False
        return True

    def _unreachable(self) -> UserError:
        hub = "not in the hub's cache on this machine" if _LOCAL_ONLY.get() else "the model hub gave no answer"
        return UserError(
            f"no such local folder, and {hub}",
            where="checkpoint",
            received=self.source,
            allowed="a hub id, a local folder, or bundled:NAME",
            hint="fetch it with `hf download` where there is a network, or set the source to its folder",
        )

    def require(self, name: str) -> Path:
        """Local path of file `name`; UserError if the repository lacks it."""
        path = self.find(name)
        if path is None:
            raise UserError(f"file {name} is missing", where=self.source, hint="check that the download is complete")
        return path

    def json(self, name: str) -> dict[str, Any]:
        path = self.require(name)
        require_whole(path)
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def tensors(self, subfolder: str = "") -> "CheckpointTensors":
        """Every tensor of one component, by name, unread."""
        prefix = f"{subfolder}/" if subfolder else ""
        for name in (*WEIGHT_FILES, RANDOM_FILE):
            index = f"{prefix}{name}.index.json"
            if self.find(index) is not None:
                return CheckpointTensors(
                    self, {tensor: prefix + shard for tensor, shard in self._shards(index).items()}
                )
            path = self.find(prefix + name)
            if path is not None:
                return CheckpointTensors(self, dict.fromkeys(open_tensors(path), prefix + name))
        raise UserError(
            "no weights found",
            where=f"{self.source}/{prefix}",
            allowed=", ".join(WEIGHT_FILES) + ", or their .index.json",
            hint="check that the download is complete",
        )

    def _shards(self, index: str) -> dict[str, str]:
        """Shard of each tensor, from an index file."""
        shards = self.json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError("the index has no weight_map", where=self.require(index), hint="download the file again")
        return shards


class CheckpointTensors(Mapping[str, Tensor]):
    """Tensors of one component by name; each is read from its shard when asked for."""

    def __init__(self, repository: Repository, shard_of: dict[str, str]) -> None:
        self._repository = repository
        self._shard_of = shard_of
        self._opened: dict[str, Mapping[str, Tensor]] = {}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        shard = self._shard_of[name]
        if shard not in self._opened:
            self._opened[shard] = open_tensors(self._repository.require(shard))
        if name not in self._opened[shard]:
            raise UserError(
                f"the shard lacks {name}, which its index places there",
                where=self._repository.require(shard),
                hint="download the file again",
            )
        self._read.add(name)
        return self._opened[shard][name]

    def require_whole(self) -> None:
        """Look at every shard without loading it; UserError if one is missing, cut short or a git-lfs pointer."""
        for shard in sorted(set(self._shard_of.values())):
            require_whole(self._repository.require(shard))

    def loading(self) -> "LoadingReport":
        taken = tuple(name for name in self._shard_of if name in self._read)
        left = tuple(name for name in self._shard_of if name not in self._read)
        return LoadingReport(self._repository.source, taken, left)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def digest(self, prefixes: Iterable[str]) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor whose name starts with one of `prefixes`."""
        wanted = tuple(prefixes)
        digest = hashlib.sha256()
        for name in sorted(name for name in self if name.startswith(wanted)):
            tensor = self[name].contiguous()
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def open_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of one file by name: safetensors, random ones, or a pickle read without running any code in it.

    Raises:
        UserError: the file is damaged, holds more than tensors, or holds no tensors by name.
    """
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="pt")  # mapped into memory
            return TensorView({name: partial(file.get_tensor, name) for name in file.keys()})  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise UserError(f"not a safetensors file: {error}", where=path, hint="download the file again") from error
    if path.name == RANDOM_FILE:
        return RandomTensors(path)
    loaded = load_without_code(path, hint="use a safetensors version of this checkpoint")
    if not isinstance(loaded, dict):
        raise UserError("holds no tensors by name", where=path, received=type(loaded).__name__)
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}


def load_without_code(path: Path, *, hint: str) -> Any:
    """What `torch.save` wrote, as long as it is made of tensors and plain values; tensors stay on disk until used.

    Args:
        hint: what to do with a file that holds more.

    Raises:
        UserError: the file is damaged, or holds objects whose loading would run code.
    """
    import pickle

    refuse_pointer(path)
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if not _looks_like_a_checkpoint(path):
            raise UserError("damaged, or not a checkpoint", where=path, hint="download the file again") from error
        raise UserError(
            "damaged, or holds more than tensors, which could run as code and is not loaded", where=path, hint=hint
        ) from error
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        # What the reader of pickles raises for bytes that are none.
        raise UserError("damaged, or not a checkpoint", where=path, hint="download the file again") from error
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error).partition(". ")[0] or "it ends too early"
        raise UserError(f"damaged checkpoint: {reason}", where=path, hint="download the file again") from error


def _looks_like_a_checkpoint(path: Path) -> bool:
    """Whether a file begins as `torch.save` writes it: as a zip archive, or before torch 1.6 as a pickle."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


@dataclass(frozen=True)
class LoadingReport:
    """What became of every tensor when a network was filled from one checkpoint.

    Attributes:
        taken: its tensors that were read, by its own names.
        initialised: what is trained and no checkpoint has given a value so far, by the model's names: random or zero.
    """

    source: str
    taken: tuple[str, ...]
    left: tuple[str, ...]
    initialised: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line: how many of each, and under which prefixes."""
        line = f"{self.source}: took {_grouped(self.taken, 1)}, left {_grouped(self.left, 1)}"
        return f"{line}; still at the start: {_grouped(self.initialised, 2)}" if self.initialised else line


OnLoaded = Callable[[LoadingReport], None]


def log_loading(report: LoadingReport) -> None:
    """Write a report into the log, for callers that do nothing else with it."""
    _LOG.info(report.summary())


def _grouped(names: tuple[str, ...], depth: int) -> str:
    """The number of names and, in brackets, of each prefix of `depth` parts."""
    groups = Counter(".".join(name.split(".")[:depth]) for name in names)
    inside = ", ".join(f"{prefix} {count}" for prefix, count in groups.items())
    return f"{len(names)} ({inside})" if groups else "0"
