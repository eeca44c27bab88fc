"""The doctor's checks of the machine: installed packages, devices, free disk, weights."""

import json
import os
import platform
import shutil
from collections.abc import Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from model.config import TeacherConfig
from pipeline.doctor.findings import Finding
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.errors import UserError
from stages.files import nearest_existing
from stages.weights.whole_files import TOKENIZER_FILES, VOCABULARY_FILES, WEIGHT_FILES, Needs, require_whole
from stages.wording import GIB, counted

_DISTRIBUTION = "diff-lmm"
_LOW_DISK_GIB = 5


_TEACHER = "teacher.source"
_TRAINED_FROM = {
    "qformer.source": Needs(
        ("config.json", "qformer_tokenizer/tokenizer_config.json"),
        prefixes=("qformer.", "query_tokens", "language_projection."),
        tokenizer="qformer_tokenizer",
    ),
    "language.source": Needs(("config.json", "tokenizer_config.json"), prefixes=("language_model.",), tokenizer=""),
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
            bfloat16 = (
                "bfloat16"
                if torch.cuda.is_bf16_supported(including_emulation=False)
                else "no bfloat16, so float32 is used"
            )
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
    from stages.frozen.towers import TOWER_NEEDS

    checkpoints: dict[str, Needs | None] = {"encoder.source": TOWER_NEEDS, _TEACHER: None, **_TRAINED_FROM}
    for setting, needs in checkpoints.items():
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
    from stages.frozen.load import FAMILIES, teacher_sources
    from stages.frozen.towers import TOWER_NEEDS
    from stages.weights.published import PUBLISHED
    from stages.weights.repository import local_only

    with local_only():
        every = FAMILIES[config.teacher.kind].needs(config.teacher)
    for name, source in teacher_sources(config.teacher).items():
        needs = every[name]
        yield f"teacher.{name}", source, ("",) if needs is None else needs.prefixes
    for setting, needs in {"encoder.source": TOWER_NEEDS, **_TRAINED_FROM}.items():
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
    from stages.frozen.load import FAMILIES, teacher_sources
    from stages.weights.repository import local_only

    kind = _other_kind(config)
    with local_only():
        every = FAMILIES[config.kind].needs(config)
    for name, source in teacher_sources(config).items():
        setting, needs = f"teacher.{name}", every[name]
        if setting == _TEACHER and kind is not None:
            fix = f"set teacher.kind={kind}, or {_TEACHER} to another"
            yield Finding("weights", _TEACHER, "problem", f"{source}: not of kind {config.kind}", fix)
        elif needs is not None:
            yield _find_checkpoint(setting, source, needs)
        elif (path := Path(source).expanduser()).is_file():
            yield _whole(setting, source, [path], f"get {source} again")
        else:
            fix = f"set {setting} to a file that exists"
            yield Finding("weights", setting, "missing", f"{source}: no such file", fix)


def _other_kind(config: TeacherConfig) -> str | None:
    """The kind of the teacher's checkpoint, if it is here and is of another than the settings'."""
    from stages.frozen.load import other_kind
    from stages.weights.repository import local_only

    try:
        with local_only():
            return other_kind(config)
    except UserError:
        return None  # it is not on this machine


def _find_checkpoint(setting: str, source: str, needs: Needs) -> Finding:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from stages.weights.repository import Repository

    local = Repository(source).folder
    folder, fix = local, f"complete the folder {local}, or set {setting} to another"
    if local is None:
        try:
            file = try_to_load_from_cache(source, needs.files[0])
        except HFValidationError:
            fix = f"set {setting} to a folder that exists or to a hub id of the form owner/name"
            return Finding("weights", setting, "missing", f"{source}: no such folder, and not a hub id", fix)
        folder = Path(file).parents[needs.files[0].count("/")] if isinstance(file, str) else None
        fix = f"run `hf download {source}`"
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


def _weight_files(folder: Path, prefixes: tuple[str, ...]) -> list[Path]:
    """The files that hold wanted tensors, there or not; empty where nothing says which they are."""
    # Where a repository offers both formats, safetensors are what is read.
    indexes = sorted(folder.glob("*.index.json"), key=lambda path: ".safetensors." not in path.name)
    if indexes:
        require_whole(indexes[0])
        shard_of: dict[str, str] = json.loads(indexes[0].read_text(encoding="utf-8")).get("weight_map", {})
        wanted = {shard for name, shard in shard_of.items() if name.startswith(prefixes)}
        # A language model of another family names its tensors otherwise, and is needed whole.
        return [folder / shard for shard in sorted(wanted or set(shard_of.values()))]
    return [path for name in WEIGHT_FILES if (path := folder / name).is_file()][:1]
