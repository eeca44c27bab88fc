"""The networks of Stage 2 from their checkpoints: the language model, and the Q-Former with all that is trained."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.config import LanguageConfig, ModelConfig
from model.frozen import load_named
from stages.device import pick_device
from stages.errors import UserError
from stages.networks.checkpoint import Checkpoints
from stages.networks.quantization import quantize_layers, require_quantization
from stages.weights.instructblip import instructblip_config, is_instructblip, language_config, loading, naming
from stages.weights.lavis import FRAME_POSITIONS, LavisTensors, open_lavis
from stages.weights.random import RANDOM_FILE
from stages.weights.repository import CheckpointTensors, LoadingReport, OnLoaded, Repository, log_loading, open_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from model.diff_lmm import DiffLMM
    from model.language import SpecialTokens

_LOG = logging.getLogger(__name__)

TRAINED_FILE = "model.safetensors"
"""Trained parameters by the model's own names, in a checkpoint of a run and in an exported folder."""

_QFORMER, _QUERIES, _PROJECTION = "qformer.", "query_tokens", "language_projection."
_TABLE = "qformer.frame_positions.weight"
# Parts that may keep their start when a checkpoint's do not fit: they depend on teacher and language model.
_ALIGNMENT, _LEVELS = "alignment.", "alignment.level_numbers"
_REPLACEABLE = (_ALIGNMENT, _PROJECTION)


def load_language(config: LanguageConfig, dtype: torch.dtype, on_loaded: OnLoaded = log_loading) -> "PreTrainedModel":
    """Read the frozen causal language model out of an InstructBLIP checkpoint, or any of transformers' own.

    It is on the CPU, but for its layers' matrices if they are quantised: these are on this machine's device.

    Raises:
        UserError: it is no causal language model, or the checkpoint lacks tensors or has them in other shapes; or
            quantising it needs what is not installed.
    """
    require_quantization(config.quantize)
    repository = Repository(config.source)
    by_name = is_instructblip(repository) or repository.find(RANDOM_FILE) is not None
    load = _load_language_by_name if by_name else _load_own_language
    model = load(repository, dtype, on_loaded)
    if config.quantize != "none":
        quantize_layers(model, config.quantize, dtype, pick_device())
    return model


def _load_language_by_name(repository: Repository, dtype: torch.dtype, on_loaded: OnLoaded) -> "PreTrainedModel":
    """Read the language model inside an InstructBLIP, and nothing else of that; or random weights."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    source = repository.source
    with naming(source), no_init_weights():
        with loading("language model", source):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(language_config(repository), dtype=dtype)
        model.tie_weights()  # left out where nothing is initialised
        tensors, prefix = repository.tensors(), "language_model." if is_instructblip(repository) else ""
        on_loaded(_report(source, tensors, load_named(model, tensors, prefix=prefix)))
    return model


def _load_own_language(repository: Repository, dtype: torch.dtype, on_loaded: OnLoaded) -> "PreTrainedModel":
    """Read one of transformers' own causal language models, whole or not at all."""
    from transformers import AutoModelForCausalLM

    source = repository.source
    if repository.folder is not None:
        repository.tensors().require_whole()
    with loading("language model", source):
        model, found = AutoModelForCausalLM.from_pretrained(
            repository.folder or source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    # transformers fills what is missing with random numbers and goes on.
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UserError(f"checkpoint lacks {len(missing)} tensor(s): {', '.join(missing[:5])}", where=source)
    if found["mismatched_keys"]:
        wrong = [f"{name}: checkpoint {tuple(a)}, model {tuple(b)}" for name, a, b in sorted(found["mismatched_keys"])]
        raise UserError(f"checkpoint does not fit its configuration: {'; '.join(wrong[:5])}", where=source)
    unread = found["unexpected_keys"]
    stored = repository.tensors()
    on_loaded(_report(source, stored, tuple(name for name in stored if name not in unread)))
    return model


def build_diff_lmm(
    config: ModelConfig,
    *,
    language: "PreTrainedModel",
    special: "SpecialTokens",
    visual_width: int,
    target_width: int | None,
    seed: int,
    on_loaded: OnLoaded = log_loading,
) -> "DiffLMM":
    """Build Stage 2's model as training starts it: `qformer.source`, and `qformer.start` laid over it.

    Args:
        config: the networks.
        language: the frozen language model, weights loaded.
        special: its `SpecialTokens`.
        visual_width: C of the cached features.
        target_width: D of the cached targets; None to build no alignment heads whatever lambda is.
        seed: of every weight that no checkpoint gives.
        on_loaded: called with what was taken from each checkpoint, in the order of loading.

    Raises:
        UserError: a checkpoint is missing, damaged, or does not fit.
    """
    model = new_diff_lmm(
        config, language=language, special=special, visual_width=visual_width, target_width=target_width, seed=seed
    )
    base = _load_instructblip(model, config.qformer.source)
    on_loaded(base)
    if config.qformer.start is not None:
        on_loaded(_lay_over(model, config.qformer.start, untouched=set(base.initialised)))
    return model


def new_diff_lmm(
    config: ModelConfig,
    *,
    language: "PreTrainedModel",
    special: "SpecialTokens",
    visual_width: int,
    target_width: int | None,
    seed: int,
) -> "DiffLMM":
    """Build the model with every trained parameter at its random or zero start; arguments as `build_diff_lmm`.

    Raises:
        UserError: the Q-Former of `qformer.source` takes features of another width.
    """
    from model.alignment import Alignment
    from model.diff_lmm import DiffLMM
    from model.language import FrozenLanguageModel
    from model.qformer.qformer import MemoryQFormer

    described = instructblip_config(Repository(config.qformer.source))
    # transformers sets encoder_hidden_size to the vision tower's width, whatever the file states.
    if described.qformer_config.encoder_hidden_size != visual_width:
        raise UserError(
            f"the Q-Former takes features of width {described.qformer_config.encoder_hidden_size}, "
            f"the cache holds {visual_width}",
            where=f"qformer.source {config.qformer.source}",
            hint="train from the checkpoint whose vision tower made the cache",
        )
    torch.manual_seed(seed)
    qformer = MemoryQFormer(described.qformer_config, described.num_query_tokens, config.qformer)
    alignment = None
    if config.alignment.kd_weight > 0 and target_width is not None:
        alignment = Alignment(
            config.alignment,
            hidden_width=qformer.query_tokens.shape[2],
            target_width=target_width,
            num_levels=qformer.num_levels,
        )
    return DiffLMM(qformer, FrozenLanguageModel(language, special), alignment, config.alignment.kd_weight)


def _load_instructblip(model: "DiffLMM", source: str) -> LoadingReport:
    """Fill Q-Former, query tokens and projection from an InstructBLIP checkpoint, whole or not at all.

    Only the projection may stay at its start, when the checkpoint's leads to another language model.
    """
    tensors = Repository(source).tensors()
    with naming(source):
        taken = load_named(model.qformer.qformer, tensors, prefix=_QFORMER)
        _load_parameter(model.qformer.query_tokens, tensors, _QUERIES)
        stored = tensors.get(f"{_PROJECTION}weight")
        if stored is not None and stored.shape != model.language_projection.weight.shape:
            _LOG.warning("language_projection starts at random: %s fits another language model", source)
            projection: tuple[str, ...] = ()
        else:
            projection = load_named(model.language_projection, tensors, prefix=_PROJECTION)
    filled = {f"qformer.{name}" for name in (*taken, _QUERIES)} | set(projection)
    # Only what is learned: the buffers of the alignment belong to the start.
    initialised = tuple(name for name in model.trained_parameters() if name not in filled)
    return _report(source, tensors, (*taken, _QUERIES, *projection), initialised)


def _load_parameter(parameter: torch.nn.Parameter, tensors: Mapping[str, Tensor], name: str) -> None:
    """Fill one parameter that belongs to no module of its own; ValueError as `load_named`."""
    if name not in tensors:
        raise ValueError(f"checkpoint lacks {name}")
    stored = tensors[name]
    if stored.shape != parameter.shape:
        raise ValueError(f"{name}: checkpoint {tuple(stored.shape)}, model {tuple(parameter.shape)}")
    parameter.data.copy_(stored)


def _lay_over(model: "DiffLMM", start: str, *, untouched: set[str]) -> LoadingReport:
    """Fill what a file or folder named by `qformer.start` has of the trained parameters; the rest stays.

    Args:
        model: with the values of `qformer.source`.
        start: a LAVIS or MA-LMM `.pth`; a run, checkpoint or exported folder, or its safetensors file; a hub id.
        untouched: parameters that no checkpoint has given a value yet.

    Raises:
        UserError: nothing in it belongs to the model, or a tensor has another shape; both shapes are named.
    """
    tensors = open_start(start)
    lavis = isinstance(tensors, LavisTensors)
    name_of: Callable[[str], str] = _name_in_lavis if lavis else str
    own = model.trained_tensors()
    given = {name: name_of(name) for name in own if name_of(name) in tensors}
    if not _same_alignment(own, tensors):
        if any(name.startswith(_ALIGNMENT) for name in given):
            _LOG.warning("%s keeps its starting values: the checkpoint's heads are of other levels", _ALIGNMENT[:-1])
        given = {name: stored for name, stored in given.items() if not name.startswith(_ALIGNMENT)}
    if not any(name.startswith(_QFORMER) for name in given):
        raise UserError(
            "holds no tensor of the Q-Former",
            where=f"qformer.start {start}",
            allowed="a .pth of LAVIS or MA-LMM, a run, an exported model",
        )
    with naming(f"qformer.start {start}"):
        filled = _copy_fitting(own, tensors, given)
    taken = {given[name] for name in filled}
    if isinstance(tensors, LavisTensors):
        taken, names = tensors.stored_names(taken), tuple(tensors.stored)
    else:
        names = tuple(tensors)
    return LoadingReport(
        start,
        taken=tuple(name for name in names if name in taken),
        left=tuple(name for name in names if name not in taken),
        initialised=tuple(name for name in own if name in untouched - filled),
    )


def _same_alignment(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has the same heads and gates for the same levels."""
    mine, theirs = ({name for name in names if name.startswith(_ALIGNMENT)} for names in (own, tensors))
    return mine == theirs and (not mine or torch.equal(own[_LEVELS].cpu(), tensors[_LEVELS]))


@torch.no_grad()
def _copy_fitting(own: dict[str, Tensor], tensors: Mapping[str, Tensor], given: dict[str, str]) -> set[str]:
    """Copy the given tensors and return their names; ValueError with both shapes where one does not fit.

    Heads, gate and projection are passed over as one part each if any of their tensors has another shape.
    """
    loaded = {name: tensors[stored] for name, stored in given.items()}
    wrong = [name for name, value in loaded.items() if value.shape != own[name].shape]
    passed = tuple(part for part in _REPLACEABLE if any(name.startswith(part) for name in wrong))
    if passed:
        parts = ", ".join(part.rstrip(".") for part in passed)
        _LOG.warning("%s keeps its starting values: the checkpoint's have other shapes", parts)
    misfits = [
        f"{given[name]}: checkpoint {tuple(loaded[name].shape)}, model {tuple(own[name].shape)}"
        for name in wrong
        if not name.startswith(_REPLACEABLE)
    ]
    if misfits:
        raise ValueError(f"checkpoint does not fit the model: {'; '.join(misfits[:5])}")
    filled = {name for name in loaded if not name.startswith(passed)}
    for name in filled:
        own[name].copy_(loaded[name])
    return filled


def open_start(start: str) -> Mapping[str, Tensor]:
    """The tensors behind a `qformer.start`: of a file, a run's best checkpoint, an exported folder or a hub id.

    Raises:
        UserError: there is nothing of the kind.
    """
    path = Path(start).expanduser()
    if path.is_file():
        return open_tensors(path) if path.suffix == ".safetensors" else open_lavis(path)
    if (path / "checkpoints").is_dir():
        checkpoints = Checkpoints(path)
        return open_tensors(checkpoints.folder / checkpoints.best() / TRAINED_FILE)
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise UserError("file not found", where=f"qformer.start {start}")
    return open_tensors(Repository(start).require(TRAINED_FILE))


def _name_in_lavis(name: str) -> str:
    """A trained parameter's name as `LavisTensors` has it."""
    return FRAME_POSITIONS if name == _TABLE else name.removeprefix(_QFORMER)


def _report(
    source: str, tensors: CheckpointTensors, taken: tuple[str, ...], initialised: tuple[str, ...] = ()
) -> LoadingReport:
    known = set(taken)
    return LoadingReport(source, taken, tuple(name for name in tensors if name not in known), initialised)
