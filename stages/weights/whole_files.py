"""Whether a checkpoint's file is what its name claims and complete, by its beginning, its size and its own index."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UserError

WEIGHT_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""The names that transformers and diffusers give their files, in the order of preference."""
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER_FILES = (
    "tokenizer_config.json",
    *VOCABULARY_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
"""The names that transformers gives a tokenizer's files; a tokenizer has some of them, one of its vocabulary included.
"""


@dataclass(frozen=True)
class Needs:
    """What a network reads of its checkpoint.

    Attributes:
        files: beside the weights.
        components: folders that hold weights.
        prefixes: of the names of the tensors that are read; only their shards are needed.
        tokenizer: folder that holds a tokenizer; None where none is read.
    """

    files: tuple[str, ...]
    components: tuple[str, ...] = ("",)
    prefixes: tuple[str, ...] = ("",)
    tokenizer: str | None = None


_POINTER, _LONGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024
_FETCH = "fetch it: run `git lfs pull` in its folder, or `hf download` for its repository"
_AGAIN = "download the file again"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def refuse_pointer(path: Path) -> None:
    """UserError if a git-lfs pointer is in the place of a file, as after cloning a repository without git-lfs."""
    if path.stat().st_size > _LONGEST_POINTER:
        return
    content = path.read_bytes()
    if not content.startswith(_POINTER):
        return
    size = next((line[5:] for line in content.decode(errors="replace").splitlines() if line.startswith("size ")), "")
    stands_for = f"{int(size):,} bytes" if size.isdigit() else "a file"
    raise UserError(f"a git-lfs pointer that stands for {stands_for}, not the file itself", where=path, hint=_FETCH)


def require_whole(path: Path) -> None:
    """Look at a weight, configuration or tokenizer file without loading it.

    Raises:
        UserError: it is a git-lfs pointer, empty, cut short, or of another kind than its name claims.
    """
    refuse_pointer(path)
    if not path.stat().st_size:
        raise UserError("the file is empty", where=path, hint=_AGAIN)
    if path.suffix == ".safetensors":
        _require_safetensors(path)
    elif path.suffix in _PICKLES:
        _require_checkpoint(path)
    elif path.suffix == ".json":
        _require_json(path)
    elif path.suffix == ".model":
        _require_sentencepiece(path)


def _require_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        # It compares the file's size with what the header states that it holds.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"cut short, or not a safetensors file: {error}", where=path, hint=_AGAIN) from error


def _require_checkpoint(path: Path) -> None:
    """What `torch.save` writes: a zip archive, whose index is at its end, or before torch 1.6 a pickle."""
    with path.open("rb") as file:
        begins = file.read(2)
    if begins == b"PK" and not zipfile.is_zipfile(path):
        raise UserError("cut short: the index at its end is missing", where=path, hint=_AGAIN)
    if not begins.startswith((b"PK", b"\x80")):
        raise UserError("not a checkpoint", where=path, hint=_AGAIN)


def _require_json(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", where=path, hint=_AGAIN) from error
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=path, hint=_AGAIN)


def _require_sentencepiece(path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError("cut short, or not a SentencePiece model", where=path, hint=_AGAIN) from error
