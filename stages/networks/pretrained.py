"""The finished model: built on its device from checkpoints, saved as a folder, read back from there or from the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from stages.device import Compute, autocast, move
from stages.errors import UserError
from stages.networks.build import build_diff_lmm, load_language, new_diff_lmm
from stages.networks.exported import HEADS, About, open_export, write_export
from stages.networks.memory_law import ClipShape
from stages.networks.quantization import num_values
from stages.networks.room import compute_for
from stages.networks.tokens import Tokenizers
from stages.weights.instructblip import naming
from stages.weights.repository import LoadingReport, open_tensors

if TYPE_CHECKING:
    from model.diff_lmm import DiffLMM


# The networks that an export names by source.
_MOVABLE = ("encoder", "qformer", "language")


@dataclass(frozen=True)
class Reply:
    """Answers to one question, best first, and each one's log-probability over length ** length_penalty."""

    answers: tuple[str, ...]
    log_probability: tuple[float, ...]


class LoadedModel(ModelHubMixin):
    """Stage 2's model on its device, and what goes with it.

    `save_pretrained(folder)`, `push_to_hub(repo_id)` and `from_pretrained(folder_or_repo_id)` are those of
    huggingface_hub; the last takes `sources={"language": ..., "qformer": ...}` for frozen networks that lie elsewhere
    now, and `verify=False` to take them unseen.

    Args:
        model: on its device.
        tokenizers: of Q-Former and language model.
        compute: device and arithmetic.
        about: what else there is to know.
        loading: what was taken from each checkpoint, in order.
    """

    # Set, so that the mixin does not try to write the constructor's arguments into a configuration of its own.
    _hub_mixin_config = {}  # noqa: RUF012

    def __init__(
        self,
        model: "DiffLMM",
        tokenizers: Tokenizers,
        compute: Compute,
        about: About,
        loading: tuple[LoadingReport, ...] = (),
    ) -> None:
        self.model, self.tokenizers, self.compute = model, tokenizers, compute
        self.about, self.loading = about, loading

    @classmethod
    def start(
        cls,
        about: About,
        *,
        visual_width: int,
        target_width: int,
        seed: int,
        shard_language: bool = False,
        clip: ClipShape | None = None,
    ) -> Self:
        """The model as training starts it, on this machine's device.

        Args:
            about: its networks.
            visual_width: C of the features.
            target_width: D of the teacher targets.
            seed: of every weight that no checkpoint gives.
            shard_language: whether the language model lies in pieces on the processes that train together.
            clip: one that is to be learned from, to see before whether the memory holds that.

        Raises:
            UserError: a checkpoint is missing or damaged, networks and settings do not fit each other, or a CPU's
                memory does not hold them.
        """
        reports: list[LoadingReport] = []
        compute, frozen = compute_for(about.networks, about.precision, target_width=target_width, clip=clip)
        device = compute.device
        tokenizers = Tokenizers.load(about.networks)
        language = load_language(about.networks.language, frozen, reports.append)
        try:
            model = build_diff_lmm(
                about.networks,
                language=language,
                special=tokenizers.special,
                visual_width=visual_width,
                target_width=target_width,
                seed=seed,
                on_loaded=reports.append,
            )
        except ValueError as error:
            raise UserError(str(error), where="configuration") from error
        if shard_language:
            from stages.networks.sharding import shard_layers

            shard_layers(language, device)
        return cls(model.to(device), tokenizers, compute, about, tuple(reports))

    @classmethod
    def finished(cls, about: About, trained: Mapping[str, Tensor], *, visual_width: int, where: str | Path) -> Self:
        """The model with trained parameters and without alignment heads, on this machine's device, in eval mode.

        Args:
            about: its networks.
            trained: every trained parameter by the model's names; those of alignment heads are passed over.
            visual_width: C of the features.
            where: what `trained` was read from, for messages.

        Raises:
            UserError: a frozen network is missing or damaged, the parameters do not fit, or a CPU's memory does not
                hold them.
        """
        compute, frozen = compute_for(about.networks, about.precision)
        tokenizers = Tokenizers.load(about.networks)
        model = new_diff_lmm(
            about.networks,
            language=load_language(about.networks.language, frozen),
            special=tokenizers.special,
            visual_width=visual_width,
            target_width=None,
            seed=0,
        )
        with naming(str(where)):
            model.load_trained({name: trained[name] for name in trained if not name.startswith(HEADS)})
        return cls(model.to(compute.device).eval(), tokenizers, compute, about)

    @property
    def trained_count(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.model.trained_parameters().values())

    @property
    def frozen_count(self) -> int:
        """Number of frozen values."""
        return sum(num_values(parameter) for parameter in self.model.parameters()) - self.trained_count

    @torch.no_grad()
    def answer(self, features: Tensor, questions: Sequence[str]) -> list[Reply]:
        """Answer one question about each clip [B, T, P, C] of the visual encoder's features, as people put it.

        Raises:
            UserError: as many clips as questions are needed, of the Q-Former's visual width and room.
        """
        width, most = self.model.qformer.frame_positions.embedding_dim, self.model.qformer.config.max_frames
        fits = features.ndim == 4 and features.shape[3] == width and 0 < features.shape[1] <= most
        if not fits or len(features) != len(questions):
            raise UserError(
                "features do not fit the model or the questions",
                received=tuple(features.shape),
                allowed=f"[{len(questions)}, at most {most} frames, patches, {width}]",
            )
        model, device = self.model.eval(), self.compute.device
        prompts = [self.tokenizers.fitted(*self.about.prompt(one)) for one in questions]
        ids, mask = self.tokenizers.prompts(prompts)
        config = self.about.networks.language
        with autocast(device, self.compute.dtype):
            queries, _ = model.watch(features.to(device), move(self.tokenizers.question(prompts), device))
            found = model.language.generate(queries, ids.to(device), mask.to(device), config)
        texts = self.tokenizers.decode(found.ids)
        scores = found.log_probability.tolist()
        return [Reply(tuple(beams), tuple(each)) for beams, each in zip(texts, scores, strict=True)]

    def _save_pretrained(self, save_directory: Path) -> None:
        write_export(save_directory, self.model.trained_tensors(), self.about)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        sources: Mapping[str, str] | None = None,
        verify: bool = True,
        **hub: Any,
    ) -> Self:
        export = open_export(model_id, hub)
        networks = export.record.description.networks
        for branch, source in (sources or {}).items():
            if branch not in _MOVABLE:
                raise UserError("no such network", where="sources", received=branch, allowed=", ".join(_MOVABLE))
            moved = getattr(networks, branch).model_copy(update={"source": source})
            networks = networks.model_copy(update={branch: moved})
        if verify:
            export.require_language(networks.language)
        about = export.record.description.model_copy(update={"networks": networks})
        trained, width = open_tensors(export.weights), export.record.visual_width
        return cls.finished(about, trained, visual_width=width, where=export.source)
