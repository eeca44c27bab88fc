"""What decides a cached feature: the fields of a cache's fingerprint."""

from model.config import ModelConfig, Settings
from stages.cache.fingerprint import Fingerprint, Scalar
from stages.cache.storage import STORAGE_FIELD
from stages.config import ExtractConfig
from stages.device import pick_device, pick_dtype
from stages.frozen.load import describe_encoder, describe_teacher
from stages.frozen.source import FrozenSource
from stages.weights.repository import OnLoaded, log_loading


def feature_fields(config: ModelConfig, *, with_teacher: bool = True) -> dict[str, Scalar]:
    """The part of a fingerprint that follows from the configuration; Stage 2 compares these.

    Every setting of encoder and teacher is in it: those that the chosen network does not read cannot be changed.
    """
    fields: dict[str, Scalar] = {
        **_named("encoder", config.encoder),
        "frame.rule": "the frame shown at t",
        "frame.resize": "native to square, bicubic, antialiased, uint8",
    }
    return {**fields, **_named("teacher", config.teacher)} if with_teacher else fields


def _named(part: str, settings: Settings) -> dict[str, Scalar]:
    return {f"{part}.{name}": value for name, value in settings.model_dump().items()}


def checkpoint_fields(part: str, source: FrozenSource) -> dict[str, Scalar]:
    """The part of a fingerprint that a frozen network's checkpoint decides; `part` is encoder or teacher."""
    facts = {**source.facts, "weights": source.digest, "size_px": source.size_px}
    return {f"{part}.{name}": value for name, value in facts.items()}


def settle_precision(extract: ExtractConfig) -> ExtractConfig:
    """Decide an `auto` precision here, once, so that all workers compute alike and the fingerprint is true."""
    dtype = str(pick_dtype(extract.precision, pick_device())).removeprefix("torch.")
    return extract.model_copy(update={"precision": dtype})


def fingerprint(config: ModelConfig, extract: ExtractConfig, on_loaded: OnLoaded = log_loading) -> Fingerprint:
    """Everything that changes a cached feature, weights included: reads and hashes the weights that are used.

    `on_loaded` is called with the tensors, checkpoint by checkpoint. The precision must be settled
    (`settle_precision`).
    """
    assert extract.precision != "auto"
    computed: dict[str, Scalar] = {"precision": extract.precision, STORAGE_FIELD: extract.storage}
    if extract.decode_device != "cpu":
        computed["frame.decoded_on"] = extract.decode_device
    for part, source in (("encoder", describe_encoder(config.encoder)), ("teacher", describe_teacher(config.teacher))):
        computed |= checkpoint_fields(part, source)
        for report in source.loading:
            on_loaded(report)
    return Fingerprint(fields={**feature_fields(config), **computed})
