"""The frozen causal language model: answer loss (Eq. 8), beam search, and ranking of given answers.

Layout of a training sequence, per sample: [Q query embeddings][start, prompt][answer, end][padding]; the loss counts
the answer and its end token only. In generation and ranking the prompt is padded on its left, between queries and
prompt, and the padding is masked (MA-LMM:lavis/models/blip2_models/blip2_vicuna_instruct.py:116-138, 255-293).
Positions count real tokens only and are passed explicitly: left to themselves, most models count padding too.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from model.config import LanguageConfig
from model.frozen import FrozenModule


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that begin a prompt and end an answer.

    InstructBLIP-Vicuna uses `</s>` (2) for both, whatever its published configuration states (docs/checkpoints.md), so
    they are passed explicitly wherever they matter.
    """

    start_id: int
    end_id: int


@dataclass(frozen=True)
class AnswerTokens:
    """Prompt and answer for training: ids [B, S] int64, padded on the right, and masks [B, S] bool.

    Attributes:
        ids: start token, prompt, answer, end token.
        mask: True on real tokens.
        answer_mask: True on the answer and its end token, the tokens that are predicted.
    """

    ids: Tensor
    mask: Tensor
    answer_mask: Tensor


@dataclass(frozen=True)
class Candidates:
    """Answers to rank: ids [K, S] int64 with the end token, padded on the right, and mask [K, S] bool on real ones."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Answers:
    """Beams of one batch, best first.

    Attributes:
        ids: [B, K, S'] int64 new tokens, padded with the end token.
        log_probability: [B, K] float32, each beam's summed log-probability over length ** length_penalty.
    """

    ids: Tensor
    log_probability: Tensor


class FrozenLanguageModel(FrozenModule):
    """A causal language model that is never trained, asked through input embeddings.

    Args:
        model: any causal language model of transformers, weights loaded.
    """

    def __init__(self, model: PreTrainedModel, special: SpecialTokens) -> None:
        super().__init__()
        self.model = model
        self.special = special
        # Sampling, penalties or forced tokens that a checkpoint brings along are none of ours.
        model.generation_config = GenerationConfig()
        # Models whose attention knows distances only (ALiBi) take none.
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.freeze()

    @property
    def width(self) -> int:
        """Width of an input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def _embed(self, queries: Tensor, ids: Tensor) -> Tensor:
        words: Tensor = self.model.get_input_embeddings()(ids)
        return torch.cat([queries.to(words.dtype), words], dim=1)

    def _run(self, queries: Tensor, ids: Tensor, mask: Tensor, *, use_cache: bool) -> Any:
        """The model's output on [queries, ids]; mask [B, Q + S] bool."""
        return self.model(
            inputs_embeds=self._embed(queries, ids),
            attention_mask=mask.long(),
            use_cache=use_cache,
            **self._positions((mask.long().cumsum(1) - 1).clamp(min=0)),
        )

    def _positions(self, position_ids: Tensor) -> dict[str, Tensor]:
        return {"position_ids": position_ids} if self._takes_positions else {}

    def answer_loss(self, queries: Tensor, tokens: AnswerTokens, weights: Tensor | None = None) -> Tensor:
        """Eq. 8: cross entropy of the answer tokens given queries [B, Q, W] and prompt; scalar.

        The mean over tokens, or with `weights` [B] their sum, each token weighted as its sample.
        """
        num_queries = queries.shape[1]
        mask = torch.cat([tokens.mask.new_ones(queries.shape[:2]), tokens.mask], dim=1)
        logits = self._run(queries, tokens.ids, mask, use_cache=False).logits
        # The token at text position i is predicted at sequence position Q + i - 1.
        predicted = logits[:, num_queries - 1 : -1]
        predicted, right = predicted[tokens.answer_mask].float(), tokens.ids[tokens.answer_mask]
        if weights is None:
            return F.cross_entropy(predicted, right)
        of_tokens = weights[:, None].expand_as(tokens.answer_mask)[tokens.answer_mask]
        return (F.cross_entropy(predicted, right, reduction="none") * of_tokens).sum()

    @torch.no_grad()
    def generate(self, queries: Tensor, prompt: Tensor, prompt_mask: Tensor, config: LanguageConfig) -> Answers:
        """Beam search; queries [B, Q, W], prompt [B, L'] int64 padded on the left, prompt_mask [B, L'] bool.

        One beam is the greedy search.
        """
        mask = torch.cat([prompt_mask.new_ones(queries.shape[:2]), prompt_mask], dim=1)
        # The penalty is meant for new tokens only, as in MA-LMM; transformers warns that it is so at every call.
        warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")
        found = self.model.generate(
            inputs_embeds=self._embed(queries, prompt),
            attention_mask=mask.long(),
            num_beams=config.num_beams,
            num_return_sequences=config.num_beams,
            do_sample=False,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            bos_token_id=self.special.start_id,
            eos_token_id=self.special.end_id,
            pad_token_id=self.special.end_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        shape = (queries.shape[0], config.num_beams, -1)
        scores = found.sequences_scores if config.num_beams > 1 else self._greedy_scores(found, config.length_penalty)
        return Answers(found.sequences.view(shape), scores.view(shape[:2]).float())

    @torch.no_grad()
    def rank(
        self,
        queries: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        candidates: Candidates,
        *,
        normalise: Literal["mean", "sum"],
        rows: int,
    ) -> Tensor:
        """Log-likelihood of every candidate after every prompt: [B, K] float32.

        Queries and prompt are computed once per sample, and their keys and values repeated for the candidates. These
        go through together, sorted by length; a pass holds at most `rows` sequences, or B if that is more. Its memory
        is that many copies of a prefix's keys and values, whatever K is.

        Args:
            queries: [B, Q, W].
            prompt: [B, L'] int64, padded on the left.
            prompt_mask: [B, L'] bool.
            candidates: on the same device.
            normalise: mean or sum of a candidate's token log-probabilities, its end token included.
            rows: most sequences in a pass.
        """
        mask = torch.cat([prompt_mask.new_ones(queries.shape[:2]), prompt_mask], dim=1)
        prefix = self._run(queries, prompt, mask, use_cache=True)
        # The last position is real in every row, because the padding is on the left.
        first = prefix.logits[:, -1].float().log_softmax(-1)  # [B, vocabulary]
        scores = first.new_empty(queries.shape[0], candidates.ids.shape[0])
        for chosen, part in _by_length(candidates, max(1, rows // queries.shape[0])):
            total = first[:, part.ids[:, 0]]
            if part.ids.shape[1] > 1:
                total = total + self._continue(prefix.past_key_values, mask, part)
            scores[:, chosen] = total / part.mask.sum(1) if normalise == "mean" else total
        return scores

    def _continue(self, cache: Any, mask: Tensor, candidates: Candidates) -> Tensor:
        """Summed log-probability of each candidate's tokens behind its first one: [B, K].

        Args:
            cache: keys and values of the B prefixes; left as it is.
            mask: [B, Q + L'] of the prefixes.
            candidates: K of them.
        """
        num, given = candidates.ids.shape[0], candidates.ids.shape[1] - 1
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(num)
        batch = mask.shape[0]
        ids, real = (part.repeat(batch, 1) for part in (candidates.ids, candidates.mask))  # [B K, S]
        prefix = mask.repeat_interleave(num, dim=0)
        positions = prefix.sum(1, keepdim=True) + torch.arange(given, device=ids.device)
        logits = self.model(
            inputs_embeds=self.model.get_input_embeddings()(ids[:, :-1]),
            attention_mask=torch.cat([prefix, real[:, :-1]], dim=1).long(),
            past_key_values=cache,
            use_cache=True,
            **self._positions(positions),
        ).logits
        each = -F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (each.view(-1, given) * real[:, 1:]).sum(1).view(batch, num)

    def _greedy_scores(self, found: Any, length_penalty: float) -> Tensor:
        """Score of single answers, which transformers computes for several beams only: [B]."""
        log_probability = self.model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
        ended = (found.sequences == self.special.end_id).long()
        real = ended.cumsum(1) - ended == 0  # the answer and its first end token
        total: Tensor = torch.where(real, log_probability, 0.0).sum(1)
        return total / real.sum(1) ** length_penalty


def _by_length(candidates: Candidates, num: int) -> Iterator[tuple[Tensor, Candidates]]:
    """Cut the candidates into groups of at most `num` of similar length, each with its indices, without spare columns.

    Short and long ones in one group would pad the short ones.
    """
    lengths = candidates.mask.sum(1)
    for chosen in lengths.argsort(stable=True).split(num):
        longest = int(lengths[chosen].max())
        yield chosen, Candidates(candidates.ids[chosen, :longest], candidates.mask[chosen, :longest])


def build_projection(query_width: int, language_width: int) -> nn.Linear:
    """Return the trained map from Q-Former outputs to input embeddings of the language model."""
    return nn.Linear(query_width, language_width)
