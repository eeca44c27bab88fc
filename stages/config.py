"""The settings of everything that runs: data, extraction, cache, training, evaluation. Defaults stand here only."""

from typing import Annotated, Literal

from pydantic import Field

from model.config import NonNegativeFloat, PositiveInt, Settings

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class DataConfig(Settings):
    """Which data set, which part of it, and where its files are."""

    dataset: str = "lvu"
    """A bundled card (lvu, msvd_qa, synthetic) or the path of a card of your own."""
    task: str = "all"
    """One task of the card, or all."""
    videos: str | None = None
    """Folder of the video files; None means data/<dataset>/videos."""
    annotations: str | None = None
    """Folder of the annotation files; None means data/<dataset>/annotations."""


class CacheConfig(Settings):
    """The feature cache."""

    root: str | None = None
    """Directory of the cache; None means caches/<dataset>-<encoder>-<teacher>."""
    tolerance_s: NonNegativeFloat = 0.001
    """How far a cached frame's time may lie from the time a sample asks for, in seconds."""


class ExtractConfig(Settings):
    """Stage 1: decoding, frozen networks, writing."""

    decoder: Literal["pyav", "decord"] = "pyav"
    """Decoder; decord refuses the kinds of file in which it returns wrong frames."""
    tolerance_s: NonNegativeFloat = 0.5
    """How far past a video's last frame a time may lie and still show that frame, in seconds."""
    decode_workers: PositiveInt | None = None
    """Decode children per model actor; None means its node's CPU cores, divided by the actors there."""
    deadline_s: PositiveFloat = 300.0
    """Longest time one attempt to decode a video may take before its child is killed, in seconds."""
    memory_gb: PositiveFloat = 8.0
    """Address space one decode child may take, in GiB."""
    batch_size: PositiveInt = 64
    """Frames per pass through the frozen networks on a GPU, halved where they do not fit; a CPU takes 8 at most."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of vision tower and DiT (never the VAE); auto is bfloat16 on a GPU that has it, else float32."""
    storage: Literal["float16", "float32", "bfloat16", "int8"] = "float16"
    """Type of the stored features; targets are always float32. int8 has a scale per channel of the video and takes half
    the bytes of float16."""
    max_attempts: PositiveInt = 2
    """How often a video may be alone in a worker that dies before it counts as failed."""


class TrainConfig(Settings):
    """Stage 2's training; the defaults are the paper's section 4.2 and MA-LMM's recipe (FACTS.md C.7)."""

    epochs: PositiveInt = 20
    """Passes over the training samples."""
    batch_size: PositiveInt = 64
    """Samples per optimizer step."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's decay; vectors (biases, norms) get none."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW's second-moment rate."""
    grad_clip: PositiveFloat | None = None
    """Largest norm of the gradient over all parameters; null switches clipping off, as in the paper's recipe."""
    schedule: Literal["ma_lmm", "cosine"] = "ma_lmm"
    """ma_lmm: linear warm-up within epoch 0, then a cosine that steps once per epoch; cosine: both per step."""
    warmup_steps: NonNegativeInt = 1000
    """Steps of linear warm-up; the cosine schedule takes at most 5 % of all steps."""
    warmup_start_lr: NonNegativeFloat = 1e-8
    """Learning rate at step 0."""
    kd_frames: Literal["all", "last"] | PositiveInt = "all"
    """Frames that carry the distillation loss: all, the last, or so many drawn at random per step."""
    frames_per_run: PositiveInt | None = None
    """Frames the Q-Former computes at once, which bounds the memory of a step; None means twice its memory slots."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast of the networks; losses are float32. auto is bfloat16 on a GPU that has it, else float32."""
    workers: NonNegativeInt = 2
    """Processes that read the cache."""
    validate_every: PositiveInt = 1
    """Epochs between validations."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay beside the best."""
    seed: NonNegativeInt = 42
    """Seed of weights, order and dropout."""


class EvaluateConfig(Settings):
    """Answering and scoring."""

    method: Literal["generate", "rank", "both"] = "generate"
    """generate: beam search. rank: a classification's candidate answers by their log-likelihood. both: one after the
    other on the same frames."""
    batch_size: PositiveInt = 32
    """Samples at once."""
    rank_score: Literal["mean", "sum"] = "mean"
    """Log-likelihood of a candidate: mean over its tokens, end included, or their sum, which favours short answers."""
    rank_rows: PositiveInt = 256
    """Candidates times samples that go through the language model at once; more take more memory, not other scores."""


class RunConfig(Settings):
    """Where runs are kept."""

    folder: str = "runs"
    """Parent folder of all runs."""
    name: str | None = None
    """Name of the run; None means <dataset>-<task>-<preset>."""
