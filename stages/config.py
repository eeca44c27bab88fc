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
    prompts: Literal["ma-lmm", "paper"] = "ma-lmm"
    """Wording of the questions where the annotations hold only labels: MA-LMM's ("what is the way_speaking of the
    movie?") or the Diff-LMM paper's ("what is the speaking style of the movie?"), in training and evaluation alike."""
    jitter: bool = True
    """Whether training draws other frames each epoch where the card asks for it (msvd_qa); extraction then caches all
    that can be drawn; false: training sees the frames of evaluation, and the cache holds no others."""
    frame_offset: Annotated[int, Field(le=0)] = 0
    """Added to every frame index, in extraction, training and evaluation alike. At -1 frame i shows second (i - 1)/10,
    as it does in MA-LMM's JPEGs of ffmpeg 5.1; such frames are others, and a cache holds each under its own time."""
    allow_leakage: bool = False
    """Train on several tasks together although one's training videos are another's test videos."""


class CacheConfig(Settings):
    """The feature cache."""

    root: str | None = None
    """Directory or URL (s3://bucket/prefix) of the cache; None means caches/<dataset>-<encoder>-<teacher>."""
    local_copy: str | None = None
    """Folder on a disk of this machine into which training and evaluation copy each video of a cache at a URL when they
    first read it; None reads every window over the network."""
    tolerance_s: NonNegativeFloat = 0.001
    """How far a cached frame's time may be from the time a sample asks for, in seconds."""


class ExtractConfig(Settings):
    """Stage 1: decoding, frozen networks, writing."""

    decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"
    """Decoder; decord and torchcodec (an extra) refuse the kinds of file in which they return wrong frames."""
    decode_device: Literal["cpu", "cuda"] = "cpu"
    """cuda decodes on the worker's GPU, with torchcodec only; its colours are its own, so such a cache is another."""
    tolerance_s: NonNegativeFloat = 0.5
    """How far past a video's last frame a time may be and still show that frame, in seconds."""
    decode_workers: PositiveInt | None = None
    """Decode children per model actor; None means its node's CPU cores, divided by the actors there."""
    deadline_s: PositiveFloat = 300.0
    """Longest time that fetching a video, and each attempt to decode it, may take before its child is killed, in
    seconds."""
    memory_gb: PositiveFloat = 8.0
    """Address space one decode child may take, in GiB; no limit with decode_device=cuda."""
    video_gb: PositiveFloat = 16.0
    """Memory that the features of one video may take until they are written, in GiB; one that needs more has failed."""
    protocols: tuple[str, ...] = ("abfs", "az", "gcs", "gs", "hf", "http", "https", "s3")
    """Protocols of the addresses outside the videos folder that a manifest may name; file: any file of this machine."""
    download_gb: PositiveFloat = 20.0
    """Largest video that is fetched from an address, in GiB."""
    scratch: str | None = None
    """Folder for a fetched video while it is decoded; None means the system's temporary folder."""
    model_actors: PositiveInt | None = None
    """Model actors on each node; None means one per GPU, or one on a node without. More than a node has GPUs (or cores,
    where there is no GPU) are not started."""
    batch_size: Literal["auto"] | PositiveInt = "auto"
    """Frames per pass through the frozen networks. auto: on a GPU found by trial at the start, on a CPU at most 8; a
    number is rounded down to a power of two on a CPU. Where a pass does not fit after all, it is halved."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of vision tower and DiT (never the VAE); auto is bfloat16 on a GPU that has it, else float32."""
    compile: bool = False
    """Whether torch.compile makes programs of the networks, for passes of one shape: minutes at the start, fewer
    seconds per frame afterwards where it pays."""
    storage: Literal["float16", "float32", "bfloat16", "int8"] = "float16"
    """Type of the stored features; targets are always float32. int8 has a scale per channel of the video and takes half
    the bytes of float16."""
    damaged: Literal["use", "refuse"] = "use"
    """use: of a damaged file the frames that are before all damage and are proved untouched by it, with a remark in its
    commit record; refuse: a damaged file has failed. What is cached stays, whatever is chosen later."""
    digest_videos: bool = False
    """Whether each video file is read whole for a SHA-256 in its commit record, which decides whether a file of the
    same size and another modification time has changed."""
    max_attempts: PositiveInt = 2
    """How often a worker may die with just this video in it before it counts as failed."""


class TrainConfig(Settings):
    """Stage 2's training; the defaults are the paper's section 4.2, and MA-LMM's where it is silent. docs/method.md
    lists what is otherwise."""

    epochs: PositiveInt = 20
    """Passes over the training samples."""
    batch_size: PositiveInt = 64
    """Samples per optimizer step."""
    micro_batch_size: Literal["auto"] | PositiveInt = "auto"
    """Samples that go through the networks at once; the gradients of a step's parts add up to those of the whole. auto:
    as many as fit into the memory that is free. Where a step does not fit after all, this is halved, then
    frames_per_chunk."""
    answer_loss_samples: PositiveInt | None = None
    """Eq. 8 is the mean over the answer tokens of so many samples, and then the mean over these groups of the batch;
    null: the mean over all answer tokens of the batch. MA-LMM's GPUs have 16 (LVU) or 32 (MSVD-QA) each."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's decay; vectors (biases, norms) get none."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW's second-moment rate."""
    grad_clip: PositiveFloat | None = None
    """Largest norm of the gradient over all parameters; null switches clipping off, as in MA-LMM."""
    schedule: Literal["ma_lmm", "cosine"] = "ma_lmm"
    """ma_lmm: linear warm-up within epoch 0, then a cosine that steps once per epoch; cosine: both per step."""
    warmup_steps: NonNegativeInt = 1000
    """Steps of linear warm-up; the cosine schedule takes at most 5 % of all steps."""
    warmup_start_lr: NonNegativeFloat = 1e-8
    """Learning rate at step 0."""
    kd_frames: Literal["all", "last"] | PositiveInt = "all"
    """Frames that carry the distillation loss: all, the last, or so many drawn at random per step."""
    targets: Literal["own", "shuffled"] = "own"
    """Whose y* a training frame is aligned with: its own, or (shuffled, a control that must not help) that of a frame
    of another training video, drawn once from the seed."""
    frames_per_chunk: PositiveInt | None = None
    """Frames the Q-Former computes at once, which bounds the memory of a step; None means twice its memory slots, or
    fewer where one sample does not fit."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast of the networks; losses and alignment are float32 in any case. auto is bfloat16 on a GPU that has it,
    else float32; on a CPU whose memory does not hold the language model so, this alone is read in bfloat16."""
    order: Literal["random", "near"] = "random"
    """random: each epoch is a plain permutation of the samples. near: a video's samples come within a few batches of
    one another, so that frames they share are read from disk once."""
    processes: PositiveInt = 1
    """Processes that train together, each on its part of every batch and on a GPU of its own where there are GPUs;
    `torchrun` or `srun` may start them instead. This is the command's --processes."""
    shard_language: Literal["none", "fsdp"] = "none"
    """How the frozen language model is held on those processes: whole on each, or (fsdp) each layer in as many pieces
    as there are processes, put together for the moment in which it computes."""
    loader_workers: NonNegativeInt = 2
    """Processes that read the cache, beside each process that trains (see `processes`)."""
    prefetch: PositiveInt = 2
    """Parts of a step (or whole ones, see micro_batch_size) that each of those processes reads ahead."""
    validate_every: PositiveInt = 1
    """Epochs between validations."""
    best_by: Literal["accuracy", "loss"] = "accuracy"
    """What the best checkpoint is chosen by on the validation split."""
    best_of_equals: Literal["other", "first"] = "other"
    """Which of equally good validations is the best: the `other` number decides, and then the later one wins; or the
    `first` of them, as in MA-LMM."""
    patience: PositiveInt | None = None
    """Validations in a row without a better one after which training stops; null trains all epochs."""
    save_every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints within an epoch; every epoch ends with one in any case."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay beside the best."""
    log_every: PositiveInt = 10
    """Steps between rows of metrics.jsonl; only these read losses back from the device. The last step of an epoch has
    one too. Whether losses and gradients were finite is looked at then, and before anything is saved."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where curves are shown beside metrics.jsonl; wandb (Weights & Biases) needs the extra of this name."""
    wandb_project: str = "diff-lmm"
    """Project of the runs at Weights & Biases."""
    seed: NonNegativeInt = 42
    """Seed of weights, order and dropout."""


class EvaluateConfig(Settings):
    """Answering and scoring."""

    method: Literal["generate", "rank", "both"] = "generate"
    """generate: beam search. rank: a classification's candidate answers by their log-likelihood. both: one after the
    other on the same frames."""
    batch_size: Literal["auto"] | PositiveInt = "auto"
    """Samples at once. auto: as many as fit into the memory that is free, at most 32. Where they do not fit after all,
    this is halved."""
    rank_score: Literal["mean", "sum"] = "mean"
    """Log-likelihood of a candidate: mean over its tokens, end included, or their sum, which favours short answers."""
    rank_rows: Literal["auto"] | PositiveInt = "auto"
    """Candidates times samples that go through the language model at once; more take more memory, not other scores.
    auto: as many as fit, at most 256; halved where they do not fit after all."""
    resamples: PositiveInt = 10_000
    """How often videos are resampled for an interval over videos."""
    resample_seed: NonNegativeInt = 0
    """Seed of those draws; the same seed gives the same interval."""


class RunConfig(Settings):
    """Where runs are kept."""

    folder: str = "runs"
    """Parent folder of all runs."""
    name: str | None = None
    """Name of the run; None means <dataset>-<task>-<preset>."""
