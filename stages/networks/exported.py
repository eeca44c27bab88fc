"""A trained model as a folder of its own: the files, without the networks that they fill.

    config.json         networks, data set card, and source and digest of every frozen network
    model.safetensors   the trained parameters
    README.md           the model card

The frozen networks are not copied. They are read from their sources, and refused if they are not those that the model
was trained with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator
from safetensors.torch import save_file
from torch import Tensor

from model.config import EncoderConfig, LanguageConfig, ModelConfig
from stages.atomic import atomic_path, atomic_write_text
from stages.data.card_schema import Card, TaskCard
from stages.data.text import TEXT_PROCESSORS
from stages.errors import UserError
from stages.networks.build import TRAINED_FILE
from stages.records import FrozenRecord, parse_record, read_json
from stages.upgrade import upgraded
from stages.weights.instructblip import is_instructblip
from stages.weights.repository import Repository
from stages.wording import counted

Precision = Literal["auto", "float32", "bfloat16"]

HEADS = "alignment."
"""Beginning of the names of alignment heads and gate, which only training needs."""

_FORMAT, _FORMATS = "diff-lmm-1", "diff-lmm-"
_CONFIG, _README = "config.json", "README.md"
_TABLE = "qformer.frame_positions.weight"
_PACKAGES = ("diff-lmm", "torch", "transformers")


class About(FrozenRecord):
    """What a trained model needs beside its parameters.

    Attributes:
        networks: configuration of every network, trained or frozen.
        card: the data set it was trained on: prompts, labels, frame rule.
        task: the card's task, or all.
        precision: arithmetic of the networks.
    """

    networks: ModelConfig
    card: Card
    task: str
    precision: Precision

    @field_validator("networks", mode="before")
    @classmethod
    def _of_this_version(cls, networks: Any) -> Any:
        """What earlier versions wrote is read, too."""
        if not isinstance(networks, dict) or not all(isinstance(part, dict) for part in networks.values()):
            return networks
        flat = {f"{branch}.{name}": value for branch, part in networks.items() for name, value in part.items()}
        tree: dict[str, dict[str, Any]] = {branch: {} for branch in networks}
        for key, value in upgraded(flat).items():
            branch, _, name = key.partition(".")
            tree[branch][name] = value
        return tree

    @classmethod
    def of(cls, config: ModelConfig, card: Card, task: str, precision: Precision) -> "About":
        """From a configuration tree, of which the networks' branches are kept."""
        networks = ModelConfig(**{name: getattr(config, name) for name in ModelConfig.model_fields})
        return cls(networks=networks, card=card, task=task, precision=precision)

    @property
    def tasks(self) -> dict[str, TaskCard]:
        """The tasks that the model was trained on."""
        return self.card.tasks if self.task == "all" else {self.task: self.card.tasks[self.task]}

    def prompt(self, question: str) -> tuple[str, str]:
        """The question as training put it, cleaned, and the template that the model's tasks share."""
        templates = {one.template for one in self.tasks.values()}
        cleaned = TEXT_PROCESSORS[self.card.text](question)
        return cleaned, templates.pop() if len(templates) == 1 else "{}"

    def candidates(self, question: str, task: str | None = None) -> tuple[str, ...]:
        """The answers that a question may have: the labels of the task.

        Args:
            question: as the user asks it.
            task: which; None: the one with labels that asks so, or the only one with labels.

        Raises:
            UserError: there is no such task, it has no labels, or which one is meant is not known.
        """
        labels = {name: one.labels for name, one in self.tasks.items() if one.labels is not None}
        if task is None and len(labels) > 1:
            clean = TEXT_PROCESSORS[self.card.text]
            asked = [name for name in labels if clean(self.tasks[name].prompt) == clean(question)]
            task = asked[0] if len(asked) == 1 else None
        elif task is None:
            task = next(iter(labels), None)
        if task not in labels:
            raise UserError(
                "the task that has the candidates to rank is not known" if labels else "no task has candidates to rank",
                where="--task",
                received=task,
                allowed=", ".join(labels) or None,
                hint=None if labels else "leave out --method rank",
            )
        return labels[task]


class FrozenNetwork(FrozenRecord):
    """A frozen network by name: where it is read from, and SHA-256 over the weights that are read."""

    source: str
    digest: str


class ExportRecord(FrozenRecord):
    """The content of an exported folder's `config.json`; widths are those of features and teacher targets."""

    format: Literal["diff-lmm-1"]
    # Not named like an argument of `LoadedModel`: huggingface_hub's mixin would take it for one.
    description: About
    visual_width: int
    encoder: FrozenNetwork
    language: FrozenNetwork
    versions: dict[str, str]


@dataclass(frozen=True)
class Export:
    """An exported model, opened but not loaded."""

    source: str
    record: ExportRecord
    weights: Path

    def require_encoder(self, config: EncoderConfig) -> None:
        """UserError unless the visual encoder's weights are those that the model was trained with."""
        _require_same("visual encoder", self.record.encoder, config.source, encoder_digest(config))

    def require_language(self, config: LanguageConfig) -> None:
        """UserError unless the language model's weights are those that the model was trained with."""
        _require_same("language model", self.record.language, config.source, language_digest(config))


def encoder_digest(config: EncoderConfig) -> str:
    """SHA-256 over the visual encoder's weights."""
    from stages.frozen.load import describe_encoder

    return describe_encoder(config).digest


def language_digest(config: LanguageConfig) -> str:
    """SHA-256 over the language model's weights."""
    repository = Repository(config.source)
    return repository.tensors().digest(("language_model.",) if is_instructblip(repository) else ("",))


def _require_same(kind: str, then: FrozenNetwork, source: str, digest: str) -> None:
    if digest != then.digest:
        raise UserError(
            f"not the {kind} that the model was trained with, which was read from {then.source}",
            where=source,
            received=digest[:12],
            allowed=f"weights with SHA-256 {then.digest[:12]}...",
            hint="name the folder that holds those",
        )


def write_export(folder: Path, trained: Mapping[str, Tensor], about: About, *, with_heads: bool = False) -> None:
    """Write an exported folder over whatever of the kind is there; `config.json` comes last.

    Args:
        folder: made if need be.
        trained: the trained parameters by the model's names.
        about: networks and data set.
        with_heads: whether alignment heads and gate go along; only training needs them.

    Raises:
        UserError: a frozen network's weights cannot be read.
    """
    kept = {name: value for name, value in trained.items() if with_heads or not name.startswith(HEADS)}
    # Where the model began is no part of it, and often a path of one machine.
    start = about.networks.qformer.model_copy(update={"start": None})
    networks = about.networks.model_copy(update={"qformer": start})
    record = ExportRecord(
        format=_FORMAT,
        description=about.model_copy(update={"networks": networks}),
        visual_width=kept[_TABLE].shape[1],
        encoder=FrozenNetwork(source=networks.encoder.source, digest=encoder_digest(networks.encoder)),
        language=FrozenNetwork(source=networks.language.source, digest=language_digest(networks.language)),
        versions={name: version(name) for name in _PACKAGES},
    )
    (folder / _CONFIG).unlink(missing_ok=True)
    with atomic_path(folder / TRAINED_FILE) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in kept.items()}, temporary)
    atomic_write_text(folder / _README, model_card(record))
    atomic_write_text(folder / _CONFIG, record.model_dump_json(indent=2) + "\n")


def is_export(folder: Path) -> bool:
    """Whether the folder holds an exported model, of this or another version."""
    path = folder / _CONFIG
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and str(content.get("format", "")).startswith(_FORMATS)


def open_export(source: str, hub: Mapping[str, Any] | None = None) -> Export:
    """Open an exported model.

    Args:
        source: its folder or hub id.
        hub: options of `hf_hub_download`, such as revision and token.

    Raises:
        UserError: it is not there, or is none.
    """
    repository = Repository(source, hub)
    path = repository.require(_CONFIG)
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(
            "not an exported model of this version",
            where=path,
            allowed=f"format {_FORMAT}",
            hint="write one with `pipeline export RUN FOLDER`",
        )
    return Export(source, parse_record(ExportRecord, content, str(path)), repository.require(TRAINED_FILE))


def model_card(record: ExportRecord) -> str:
    """The text of an exported folder's README.md, with the metadata that the hub reads."""
    about, networks = record.description, record.description.networks
    teacher = networks.teacher.source if networks.alignment.kd_weight > 0 else None
    rows = [
        f"| {name} | {task.prompt} | {', '.join(task.labels or ('open answers',))} |"
        for name, task in about.tasks.items()
    ]
    return _CARD.format(
        title=about.card.title,
        task=about.task,
        tasks="\n".join(rows),
        frames=counted(about.card.frame_rule.num_frames, "frame"),
        encoder=networks.encoder.source,
        qformer=networks.qformer.source,
        language=networks.language.source,
        encoder_digest=record.encoder.digest,
        language_digest=record.language.digest,
        taught=f"the frozen teacher `{teacher}`" if teacher else "no teacher (the baseline)",
        versions=", ".join(f"{name} {number}" for name, number in record.versions.items()),
    )


_CARD = """\
---
library_name: diff-lmm
pipeline_tag: video-text-to-text
license: other
license_name: see-licences-below
license_link: README.md
tags:
- diff-lmm
- video
- model_hub_mixin
---
# Diff-LMM, {title}, task {task}

Q-Former with memory bank and language projection, trained on cached features with {taught}.

| task | prompt | answers |
| --- | --- | --- |
{tasks}

A clip is {frames}.

## Use

```python
from stages.networks.pretrained import LoadedModel

model = LoadedModel.from_pretrained("this folder or its hub id")
replies = model.answer(features, ["the question"])  # features [B, T, P, C] of the visual encoder below
```
```bash
pipeline predict clip.mp4 --question "..." --run THIS_FOLDER_OR_HUB_ID
```

## What is in here and what is not

`model.safetensors` holds what was trained. The frozen networks are read from their own places, and checked:

| network | source | SHA-256 of the weights that are read |
| --- | --- | --- |
| visual encoder | `{encoder}` | `{encoder_digest}` |
| language model | `{language}` | `{language_digest}` |
| shape of the Q-Former and its tokenizer | `{qformer}` | |

Written with {versions}.

## Licences

The code that reads this is Apache-2.0. These parameters were trained from, and work only with, weights whose licences
are their makers' own: those of the networks above (InstructBLIP-Vicuna's are for research, under LLaMA's terms) and of
the teacher, if there was one (the published DiT weights are CC-BY-NC-4.0: not for commercial use).
"""
