"""What the trainings on a data set will take, a model for each task: parts, memory, steps, multiply-adds and hours."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.runs.models import require_room
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.data.card_schema import Card
from stages.data.manifest import Manifest, Sample, Split
from stages.errors import UserError
from stages.extract.estimate import frame_multiply_adds
from stages.frozen.shapes import FrameShape, can_be_had, frame_shape
from stages.frozen.stand_ins import with_stand_ins
from stages.gpus import Gpu
from stages.networks.memory_law import ASSUMED_TEXT, ASSUMED_WORDS, ClipShape, Parts
from stages.networks.tokens import Tokenizers
from stages.train.estimate import TrainingEstimate, estimate_training, num_steps, num_validations
from stages.weights.instructblip import instructblip_config
from stages.weights.repository import Repository


@dataclass(frozen=True)
class TaskPlan:
    """One training: a task's samples, and what they take.

    Attributes:
        task: its name.
        samples: how many each split has.
        example: one of them.
        steps: optimizer steps.
        batch: samples of each.
        estimate: of its clips.
        multiply_adds: of the training's steps, of its validations, and of an evaluation of the test split.
    """

    task: str
    samples: dict[Split, int]
    example: Sample
    steps: int
    batch: int
    estimate: TrainingEstimate
    multiply_adds: dict[str, int]

    @property
    def step_multiply_adds(self) -> int:
        """Of one optimizer step."""
        return self.batch * self.estimate.step_multiply_adds

    @property
    def total(self) -> int:
        """All of its multiply-adds."""
        return sum(self.multiply_adds.values())


@dataclass(frozen=True)
class TrainingPlan:
    """The trainings of all tasks that were asked for.

    Attributes:
        config: the settings.
        shape: of a cached frame.
        tasks: in the card's order.
        from_card: splits whose samples the card counts, because their annotations are not here.
        assumed: checkpoints that are not here, whose published shapes were taken.
        are_tokens_assumed: whether the numbers of tokens are.
        in_4_bits: of the widest clips with `language.quantize=nf4`.
        frame_multiply_adds: of the extraction, for one frame; None where its networks' shapes are not known.
    """

    config: PipelineConfig
    shape: FrameShape
    tasks: tuple[TaskPlan, ...]
    from_card: tuple[Split, ...]
    assumed: tuple[str, ...]
    are_tokens_assumed: bool
    in_4_bits: TrainingEstimate
    frame_multiply_adds: int | None

    @property
    def widest(self) -> TaskPlan:
        """The task whose clips take most."""
        return max(self.tasks, key=lambda task: task.estimate.step_multiply_adds)

    def fit(self, gpu: Gpu, *, in_4_bits: bool = False) -> Parts | None:
        """The part of a batch that fits on a GPU, whichever task; also with the language model in 4 bits (nf4)."""
        estimate = self.in_4_bits if in_4_bits else self.widest.estimate
        return estimate.largest_part(gpu.budget(estimate.loaded_bytes), self.widest.batch)


def plan_training(config: PipelineConfig, manifest: Manifest | None) -> TrainingPlan:
    """Plan a training for each task.

    Args:
        config: the settings; what is here of its checkpoints are configuration files, at most.
        manifest: the samples; None: the card's counts are taken.

    Raises:
        UserError: networks, settings and clips do not fit each other; or there are neither annotations nor counts; or
            nothing is known of a checkpoint's shapes.
    """
    card, shape = locations.card_of(config), frame_shape(config)
    counts, samples = ({}, {}) if manifest is None else _counted(manifest)
    from_card = _add_published(card, locations.tasks_of(config, card) or list(card.tasks), counts, samples)
    try:
        tokenizers = Tokenizers.load(config)
    except UserError:  # not on this machine
        tokenizers = None
    sources = dict.fromkeys((config.qformer.source, config.language.source))
    with with_stand_ins(config, ("qformer", "language")) as dressed:
        estimates: dict[ClipShape, TrainingEstimate] = {}
        tasks = []
        for task, of_split in counts.items():
            require_room(config, max(map(_num_frames, samples[task])))
            clip = _clip(dressed, tokenizers, samples[task], shape)
            if clip not in estimates:
                estimates[clip] = _estimate(dressed, clip, shape)
            tasks.append(_task_plan(config, task, of_split, samples[task], estimates[clip]))
        widest = max(estimates, key=lambda clip: estimates[clip].step_multiply_adds)
        smaller = dressed.language.model_copy(update={"quantize": "nf4"})
        in_4_bits = _estimate(dressed.model_copy(update={"language": smaller}), widest, shape)
    try:
        with with_stand_ins(config, ("encoder", "teacher")) as dressed:
            frame: int | None = frame_multiply_adds(dressed)
    except UserError:
        frame = None
    return TrainingPlan(
        config,
        shape,
        tuple(tasks),
        from_card=from_card,
        assumed=tuple(source for source in sources if not can_be_had(source)),
        are_tokens_assumed=tokenizers is None,
        in_4_bits=in_4_bits,
        frame_multiply_adds=frame,
    )


def _counted(manifest: Manifest) -> tuple[dict[str, dict[Split, int]], dict[str, list[Sample]]]:
    """How many samples each task and split has, and the samples themselves."""
    counts: dict[str, dict[Split, int]] = {}
    samples: dict[str, list[Sample]] = {}
    for one in manifest.samples:
        of_split = counts.setdefault(one.task, {})
        of_split[one.split] = of_split.get(one.split, 0) + 1
        samples.setdefault(one.task, []).append(one)
    return counts, samples


def are_counted_by_card(config: PipelineConfig) -> bool:
    """Whether the default folder of the annotations is not here, and the card counts a task's samples itself."""
    card = locations.card_of(config)
    asked = locations.tasks_of(config, card) or list(card.tasks)
    is_absent = config.data.annotations is None and not locations.annotations_folder(config).is_dir()
    return is_absent and any(task in card.expected for task in asked)


def _add_published(
    card: Card, tasks: Sequence[str], counts: dict[str, dict[Split, int]], samples: dict[str, list[Sample]]
) -> tuple[Split, ...]:
    """Add the card's own counts of the splits that are not here, and return these splits.

    A task without samples gets, for each label, one of the form that the real ones have.
    """
    here = {split for of_split in counts.values() for split in of_split}
    added: dict[Split, None] = {}
    for task in (one for one in tasks if one in card.expected):
        for split, expected in card.expected[task].items():
            if split not in here:
                counts.setdefault(task, {})[split] = expected.samples
                added[split] = None
        samples.setdefault(task, _examples(card, task))
    return tuple(added)


def _examples(card: Card, task: str) -> list[Sample]:
    asked, rule = card.tasks[task], card.frame_rule
    example = Sample(
        id=task,
        video="any",
        task=task,
        question="?" if "{}" in asked.prompt else asked.prompt,
        prompt=asked.template,
        answer="?",
        split="train",
        start_s=0.0,
        end_s=rule.num_frames / rule.index_fps,
        num_frames=rule.num_frames,
        index_fps=rule.index_fps,
    )
    return [example.model_copy(update={"answer": label}) for label in asked.labels or ("?",)]


def _num_frames(sample: Sample) -> int:
    return sample.num_frames or len(sample.times_s or ())


def _clip(
    config: PipelineConfig, tokenizers: Tokenizers | None, samples: Sequence[Sample], shape: FrameShape
) -> ClipShape:
    """The longest of a task's clips."""
    frames = max(map(_num_frames, samples))
    queries = instructblip_config(Repository(config.qformer.source)).num_query_tokens
    if tokenizers is None:
        return ClipShape(frames, shape.tokens, ASSUMED_WORDS, queries + ASSUMED_TEXT)
    prompts, answers = zip(*dict.fromkeys((one.prompt_text, one.answer) for one in samples), strict=True)
    words = tokenizers.question(prompts).ids.shape[1]
    sequence = tokenizers.training(prompts, answers).ids.shape[1]
    # Longer prompts lose their beginning.
    longest = config.language.max_prompt_tokens + tokenizers.candidates(answers).ids.shape[1]
    return ClipShape(frames, shape.tokens, min(words, config.qformer.max_text_tokens), queries + min(sequence, longest))


def _estimate(config: PipelineConfig, clip: ClipShape, shape: FrameShape) -> TrainingEstimate:
    dtype = torch.float32 if config.train.precision == "float32" else torch.bfloat16
    try:
        return estimate_training(config, config.train, clip, target_width=shape.teacher_width, dtype=dtype)
    except ValueError as error:
        raise UserError(str(error), where="configuration") from error


def _task_plan(
    config: PipelineConfig,
    task: str,
    counts: dict[Split, int],
    samples: Sequence[Sample],
    estimate: TrainingEstimate,
) -> TaskPlan:
    steps, batch = num_steps(config.train, counts.get("train", 0))
    validated = num_validations(config.train) * counts.get("val", 0)
    multiply_adds = {
        "train": steps * batch * estimate.step_multiply_adds,
        "val": validated * (estimate.answer_multiply_adds + estimate.loss_multiply_adds),
        "test": counts.get("test", 0) * estimate.answer_multiply_adds,
    }
    return TaskPlan(task, counts, max(samples, key=lambda one: len(one.answer)), steps, batch, estimate, multiply_adds)
