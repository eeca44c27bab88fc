"""The doctor's checks of the machine: installed packages, devices, free disk, weights."""

import json
import os
import platform
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from model.config import TeacherConfig
from pipeline.doctor.findings import Finding
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.errors import UserError
from stages.files import nearest_existing
from stages.weights.whole_files import TOKENIZER_FILES, VOCABULARY_FILES, WEIGHT_FILES, require_whole
from stages.wording import GIB, counted

_DISTRIBUTION = "diff-lmm"
_LOW_DISK_GIB = 5


@dataclass(frozen=True)
class _Needs:
    """What one setting reads of its checkpoint.

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


_TEACHER = "teacher.source"
_TEACHERS = {
    "dit": _Needs(("transformer/config.json", "vae/config.json"), ("transformer", "vae")),
    "dit without its vae": _Needs(("transformer/config.json",), ("transformer",)),
    "dinov2": _Needs(("config.json",)),
    "tower": _Needs(("config.json",), prefixes=("vision_model.",)),
}
_CHECKPOINTS: dict[str, _Needs | None] = {
    "encoder.source": _TEACHERS["tower"],
    _TEACHER: None,
    "qformer.source": _Needs(
        ("config.json", "qformer_tokenizer/tokenizer_config.json"),
        prefixes=("qformer.", "query_tokens", "language_projection."),
        tokenizer="qformer_tokenizer",
    ),
    "language.source": _Needs(("config.json", "tokenizer_config.json"), prefixes=("language_model.",), tokenizer=""),
}


def check_versions(_config: PipelineConfig) -> Iterator[Finding]:
    """Compare every dependency that the installed project declares with what is installed; nothing is imported."""
    from packaging.requirements import Requirement

    yield Finding("versions", "python", "ok", platform.python_version())
    try:
        yield Finding("versions", _DISTRIBUTION, "ok", metadata.version(_DISTRIBUTION))
    except metadata.PackageNotFoundError:
        fix = "run `pip install -e .` in the project's folder"
        yield Finding("versions", _DISTRIBUTION, "missing", "not installed, so its dependencies are unknown", fix)
        return
    for text in metadata.requires(_DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            wanted = f"{requirement.name}{requirement.specifier}"
            fix = f"run `pip install '{wanted}'`"
            try:
                found = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                yield Finding("versions", requirement.name, "missing", "not installed", fix)
                continue
            if requirement.specifier.contains(found, prereleases=True):
                yield Finding("versions", requirement.name, "ok", found)
            else:
                yield Finding("versions", requirement.name, "problem", f"{found} does not fit {wanted}", fix)


def check_devices(config: PipelineConfig) -> Iterator[Finding]:
    """Count cores and memory, and name the GPUs."""
    import torch

    from stages.device import usable_cores

    yield Finding("devices", "CPU", "ok", f"{counted(usable_cores(), 'core')}, {platform.machine()}")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("devices", "memory", "ok", f"{memory_gib:.0f} GiB")

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        # The same question as stages.device.pick_dtype asks, of each device.
        with torch.cuda.device(index):
            bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16, so float32 is used"
        yield Finding(
            "devices", f"GPU {index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {bfloat16}"
        )
    if not torch.cuda.is_available():
        yield _no_gpu(config, built_for_gpu=torch.version.cuda is not None or torch.version.hip is not None)


def _no_gpu(config: PipelineConfig, *, built_for_gpu: bool) -> Finding:
    from stages.weights.repository import BUNDLED_PREFIX

    detail = "none" if built_for_gpu else "none; the installed torch is built for the CPU only"
    if config.language.source.startswith(BUNDLED_PREFIX):
        return Finding("devices", "GPU", "ok", f"{detail}; the tiny networks run on the CPU")
    what = "a machine with a GPU" if built_for_gpu else "a torch with GPU support (https://pytorch.org)"
    fix = f"use {what} for preset {config.preset}, or try the whole path on the CPU with `pipeline demo`"
    return Finding("devices", "GPU", "missing", detail, fix)


def check_disk(config: PipelineConfig) -> Iterator[Finding]:
    """Measure free space where the cache and the run will be written, or in the nearest folder that exists."""
    for item, path, setting in (
        ("cache", locations.cache_root(config), "cache.root"),
        ("run", locations.run_folder(config), "run.folder"),
    ):
        if not isinstance(path, Path):
            continue  # an object store does not report how much room it has
        there = nearest_existing(path.resolve())
        free_gib = shutil.disk_usage(there).free / GIB
        where = f"{free_gib:.1f} GiB free for {path}"
        if not os.access(there, os.W_OK):
            fix = f"get the right to write to {there}, or set {setting} to another folder"
            yield Finding("disk", item, "problem", f"{there} cannot be written to", fix)
        elif free_gib < _LOW_DISK_GIB:
            yield Finding("disk", item, "problem", where, f"free some space, or set {setting} to a larger disk")
        else:
            yield Finding("disk", item, "ok", where)


def check_weights(config: PipelineConfig) -> Iterator[Finding]:
    """Look for every checkpoint in its folder or in the hub's cache on this machine; the hub is not asked.

    Of each file that is read its beginning, size and index are looked at, so that one that is cut short, or a git-lfs
    pointer, does not pass for weights.
    """
    for setting, needs in _CHECKPOINTS.items():
        source = getattr(config, setting.partition(".")[0]).source
        try:
            if needs is None:
                yield from _find_teacher(config.teacher)
            else:
                yield _find_checkpoint(setting, source, needs)
        except UserError as error:
            yield Finding("weights", setting, "problem", str(error), f"get this file of {source} again")


def downloads_of(config: PipelineConfig, *, lacking: Collection[str] | None = None) -> dict[str, int | None]:
    """Bytes of the files of each repository of the hub that the settings need, each file whole.

    They follow from shapes and types (`stages.weights.published`); None where nothing is known of a repository.

    Args:
        config: the settings.
        lacking: those that count, as `check_weights` names them; None: all.
    """
    from stages.weights.published import download_bytes
    from stages.weights.repository import Repository

    wanted: dict[str, set[str]] = {}
    for setting, source, prefixes in _read_weights(config):
        if (lacking is None or setting in lacking) and Repository(source).folder is None:
            wanted.setdefault(source, set()).update(prefixes)
    return {source: download_bytes(source, prefixes) for source, prefixes in wanted.items()}


def absent_downloads(config: PipelineConfig) -> dict[str, int | None]:
    """`downloads_of` what is not whole on this machine."""
    return downloads_of(config, lacking={one.item for one in check_weights(config) if one.status != "ok"})


def _read_weights(config: PipelineConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Every setting that names a checkpoint, the checkpoint, and how the names of the tensors begin that it reads."""
    from stages.frozen.load import teacher_sources
    from stages.weights.published import PUBLISHED

    for name, source in teacher_sources(config.teacher).items():
        yield f"teacher.{name}", source, _TEACHERS[config.teacher.kind].prefixes
    for setting, needs in _CHECKPOINTS.items():
        if needs is not None:
            source = getattr(config, setting.partition(".")[0]).source
            # A language model of another family names its tensors otherwise, and is needed whole.
            known = PUBLISHED.get(source)
            is_whole = setting == "language.source" and (known is None or known.vision is None)
            yield setting, source, ("",) if is_whole else needs.prefixes


def check_downloads(config: PipelineConfig) -> Iterator[Finding]:
    """What each preset downloads for this data set, whatever is here already, and under which licences."""
    from pipeline.settings.config import preset_names, resolve
    from stages.weights.published import PUBLISHED

    for name in preset_names():
        preset = resolve(preset=name, options={"data.dataset": config.data.dataset}).config
        parts = [
            f"{size:,} bytes of {source} ({PUBLISHED[source].licence})" for source, size in downloads_of(preset).items()
        ]
        yield Finding("downloads", name, "ok", ", ".join(parts) or "nothing; its networks come with the project")


def _find_teacher(config: TeacherConfig) -> Iterator[Finding]:
    """Every checkpoint that a teacher of its kind reads (docs/teachers.md)."""
    from stages.frozen.dit import is_original
    from stages.frozen.load import teacher_sources

    source, vae = config.source, teacher_sources(config).get("vae_source")
    if (kind := _other_kind(config)) is not None:
        fix = f"set teacher.kind={kind}, or {_TEACHER} to another"
        yield Finding("weights", _TEACHER, "problem", f"{source}: not of kind {config.kind}", fix)
    elif not is_original(source):
        yield _find_checkpoint(_TEACHER, source, _TEACHERS["dit without its vae" if vae else config.kind])
    elif (path := Path(source).expanduser()).is_file():
        yield _whole(_TEACHER, source, [path], f"get {source} again")
    else:
        yield Finding(
            "weights", _TEACHER, "missing", f"{source}: no such file", f"set {_TEACHER} to a file that exists"
        )
    if vae is not None:
        inner = "vae/config.json"
        of_pipeline = (Path(vae).expanduser() / inner).is_file() or _hub_snapshot_if_id(vae, inner) is not None
        needs = _Needs((inner,), ("vae",)) if of_pipeline else _Needs(("config.json",))
        yield _find_checkpoint("teacher.vae_source", vae, needs)


def _other_kind(config: TeacherConfig) -> str | None:
    """The kind of the teacher's checkpoint, if it is here and is of another than the settings'."""
    from stages.frozen.load import other_kind
    from stages.weights.repository import local_only

    try:
        with local_only():
            return other_kind(config)
    except UserError:
        return None  # it is not on this machine


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; UserError if it is a git-lfs pointer or broken."""
    require_whole(path)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _find_checkpoint(setting: str, source: str, needs: _Needs) -> Finding:
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from stages.weights.repository import Repository

    local = Repository(source).folder
    folder, fix = local, f"complete the folder {local}, or set {setting} to another"
    if local is None:
        try:
            validate_repo_id(source)
        except HFValidationError:
            fix = f"set {setting} to a folder that exists or to a hub id of the form owner/name"
            return Finding("weights", setting, "missing", f"{source}: no such folder, and not a hub id", fix)
        folder, fix = _hub_snapshot(source, needs.files[0]), f"run `hf download {source}`"
    if folder is None:
        detail = f"{source}: neither a folder nor in the hub cache {constants.HF_HUB_CACHE}"
        return Finding("weights", setting, "missing", detail, fix)
    wanted, without = [folder / name for name in needs.files], []
    for part in (folder / component for component in needs.components):
        files = _weight_files(part, needs.prefixes)
        wanted += files
        without += [] if files else [f"weights in {part.name}/"]
    if needs.tokenizer is not None:
        files = [path for name in TOKENIZER_FILES if (path := folder / needs.tokenizer / name).is_file()]
        wanted += files
        without += [] if {path.name for path in files} & {*VOCABULARY_FILES} else [" or ".join(VOCABULARY_FILES[:2])]
    absent = [str(path.relative_to(folder)) for path in wanted if not path.is_file()] + without
    if absent:
        return Finding("weights", setting, "problem", f"{source}: incomplete in {folder}, without {absent[0]}", fix)
    return _whole(setting, source if str(folder) == source else f"{source} in {folder}", wanted, fix)


def _whole(setting: str, shown: str, paths: Iterable[Path], fix: str) -> Finding:
    """Whether all of these files are whole, as far as a look at each of them shows."""
    try:
        for path in paths:
            require_whole(path)
    except UserError as error:
        return Finding("weights", setting, "problem", str(error), fix)
    return Finding("weights", setting, "ok", shown)


def _hub_snapshot(source: str, file: str) -> Path | None:
    """Folder of a hub repository's files on this machine; None if `file` was never fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, file)
    return Path(found).parents[file.count("/")] if isinstance(found, str) else None


def _hub_snapshot_if_id(source: str, file: str) -> Path | None:
    from huggingface_hub.errors import HFValidationError

    try:
        return _hub_snapshot(source, file)
    except HFValidationError:
        return None


def _weight_files(folder: Path, prefixes: tuple[str, ...]) -> list[Path]:
    """The files that hold wanted tensors, there or not; empty where nothing says which they are."""
    # Where a repository offers both formats, safetensors are what is read.
    indexes = sorted(folder.glob("*.index.json"), key=lambda path: ".safetensors." not in path.name)
    if indexes:
        shard_of: dict[str, str] = _json(indexes[0]).get("weight_map", {})
        wanted = {shard for name, shard in shard_of.items() if name.startswith(prefixes)}
        # A language model of another family names its tensors otherwise, and is needed whole.
        return [folder / shard for shard in sorted(wanted or set(shard_of.values()))]
    return [path for name in WEIGHT_FILES if (path := folder / name).is_file()][:1]
