"""Text to token ids and back, for the Q-Former and for the language model."""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.language import AnswerTokens, Candidates, SpecialTokens
from model.qformer.parts import TextTokens
from stages.errors import UserError
from stages.weights.instructblip import instructblip_config, is_instructblip, language_config, loading
from stages.weights.repository import Repository
from stages.weights.whole_files import TOKENIZER_FILES, VOCABULARY_FILES, require_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# InstructBLIP-Vicuna begins prompts and ends answers with this token:
# MA-LMM:lavis/models/blip2_models/blip2_vicuna_instruct.py:81-83.
_END_TOKEN = "</s>"  # noqa: S105
# Its id in LLaMA's vocabulary of 32,000 pieces, to which the published checkpoints add some tokens of their own.
_LLAMA_END_ID = 2
_LLAMA_ROWS = range(32_000, 32_128)
# Every tokenizer of transformers has this file; asked for first: the error when all are absent is unclear.
_TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers, and the ids that frame a prompt.

    Args:
        qformer: of the Q-Former.
        language: of the language model.
        special: start and end ids of the language model.
        max_question: longest prompt in Q-Former tokens.
        max_prompt: longest prompt in tokens of the language model.
    """

    qformer: "PreTrainedTokenizerBase"
    language: "PreTrainedTokenizerBase"
    special: SpecialTokens
    max_question: int
    max_prompt: int

    @classmethod
    def load(cls, config: ModelConfig) -> "Tokenizers":
        """Read both tokenizers from the checkpoints named in the configuration.

        Raises:
            UserError: a tokenizer is missing, or gives ids that its network does not know; the language model's knows
                no end of text, or not the one that the published checkpoints were trained with.
        """
        qformer = _load_tokenizer(config.qformer.source, subfolder="qformer_tokenizer")
        described = instructblip_config(Repository(config.qformer.source)).qformer_config
        _require_rows(qformer, described.vocab_size, f"{config.qformer.source}/qformer_tokenizer")
        language = _load_tokenizer(config.language.source)
        special = _special_tokens(language, Repository(config.language.source))
        return cls(qformer, language, special, config.qformer.max_text_tokens, config.language.max_prompt_tokens)

    def fitted(self, question: str, template: str = "{}") -> str:
        """The question inside its template: the text that both networks read.

        A prompt that is too long for one of them loses the beginning of the question, word by word where that helps,
        and nothing of the template, whose words ask for an answer.

        Raises:
            UserError: the template itself is too long.
        """

        def without(start: int) -> str:
            return template.replace("{}", question[start:])

        def fits(start: int) -> bool:
            return not self.num_too_long([without(start)])

        if fits(0):
            return without(0)
        words = [found.end() for found in re.finditer(r"\s+", question) if found.end() < len(question)]
        cuts = words if words and fits(words[-1]) else range(1, len(question) + 1)
        place = bisect.bisect_left(cuts, True, key=fits)
        if place == len(cuts):
            raise UserError(
                "the text around a question is too long by itself",
                where=f"the prompt {template!r}",
                allowed=f"qformer.max_text_tokens={self.max_question}, language.max_prompt_tokens={self.max_prompt}",
            )
        return without(cuts[place])

    def num_too_long(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are too long for one of the networks."""
        different = list(dict.fromkeys(prompts))
        pairs = zip(different, self._question_ids(different), self._prompt_ids(different), strict=True)
        long = {one for one, own, started in pairs if len(own) > self.max_question or len(started) > self.max_prompt}
        return sum(prompt in long for prompt in prompts)

    def question(self, prompts: Sequence[str]) -> TextTokens:
        """Prompts that fit -> Q-Former tokens, padded on the right."""
        encoded = self._question_ids(prompts)
        ids, mask = _pad_right(encoded, fill=self.qformer.pad_token_id)
        return TextTokens(ids, mask)

    def training(self, prompts: Sequence[str], answers: Sequence[str]) -> AnswerTokens:
        """Prompts that fit, and answers -> [start, prompt, answer, end], padded on the right."""
        rows, num_answer = [], []
        for prompt, answer in zip(self._prompt_ids(prompts), self._plain_ids(answers), strict=True):
            rows.append([*prompt, *answer, self.special.end_id])
            num_answer.append(len(answer) + 1)
        ids, mask = _pad_right(rows, fill=self.special.end_id)
        lengths = mask.sum(1, keepdim=True)
        position = torch.arange(ids.shape[1])[None]
        answer_mask = mask & (position >= lengths - torch.tensor(num_answer)[:, None])
        return AnswerTokens(ids, mask, answer_mask)

    def prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts that fit -> ids and mask [B, L'] for generation, padded on the left."""
        rows = [row[::-1] for row in self._prompt_ids(prompts)]
        ids, mask = _pad_right(rows, fill=self.special.end_id)
        return ids.flip(1), mask.flip(1)

    def candidates(self, answers: Sequence[str]) -> Candidates:
        """Answers -> ids and mask [K, S] as `training` has them: answer, end."""
        return Candidates(
            *_pad_right([[*ids, self.special.end_id] for ids in self._plain_ids(answers)], fill=self.special.end_id)
        )

    def longer_than(self, answers: Sequence[str], max_new_tokens: int) -> dict[str, int]:
        """The answers that have more tokens than this, and how many.

        Their end is not counted: beam search also returns what has no end when the room is used up.
        """
        lengths = zip(answers, map(len, self._plain_ids(answers)), strict=True)
        return {answer: length for answer, length in lengths if length > max_new_tokens}

    def longest(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[int, int]:
        """Most tokens of a prompt for the Q-Former, and of a prompt with its answer for the language model.

        Prompts that are too long count as cut.
        """
        words = min(self.max_question, max(map(len, self._question_ids(list(dict.fromkeys(prompts))))))
        prompts, answers = zip(*dict.fromkeys(zip(prompts, answers, strict=True)), strict=True)
        ids = zip(self._prompt_ids(prompts), self._plain_ids(answers), strict=True)
        return words, max(min(self.max_prompt, len(prompt)) + len(answer) + 1 for prompt, answer in ids)

    def decode(self, ids: Tensor) -> list[list[str]]:
        """Generated ids [B, K, S] -> texts, special tokens and surrounding spaces removed."""
        return [
            [text.strip() for text in self.language.batch_decode(beams, skip_special_tokens=True)]
            for beams in ids.cpu()
        ]

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.language(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _question_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.qformer(list(prompts), verbose=False)["input_ids"]
        return ids

    def _prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[self.special.start_id, *ids] for ids in self._plain_ids(prompts)]


def _load_tokenizer(source: str, subfolder: str = "") -> Any:
    from transformers import AutoTokenizer

    repository = Repository(source)
    where = f"{source}/{subfolder}" if subfolder else source
    repository.require(f"{subfolder}/{_TOKENIZER_FILE}" if subfolder else _TOKENIZER_FILE)
    folder = None if repository.folder is None else repository.folder / subfolder
    for path in () if folder is None else [folder / name for name in TOKENIZER_FILES]:
        if path.is_file():
            require_whole(path)
    with loading("tokenizer", where):
        if folder is not None:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, subfolder=subfolder)
        # Without a file of its words transformers makes a tokenizer that knows only the special tokens.
        words = set(tokenizer.get_vocab()) - {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    if not words:
        raise UserError(
            "the tokenizer has no vocabulary",
            where=where,
            allowed=f"one of {', '.join(VOCABULARY_FILES)}",
            hint="fetch it with `hf download`",
        )
    return tokenizer


def _special_tokens(tokenizer: Any, repository: Repository) -> SpecialTokens:
    """The ids that frame prompt and answer: `</s>` on both sides for an InstructBLIP, else the tokenizer's own.

    Raises:
        UserError: there is no end token, or the model does not know it.
    """
    source = repository.source
    rows = language_config(repository).vocab_size
    _require_rows(tokenizer, rows, source)
    if is_instructblip(repository):
        special = _instructblip_tokens(tokenizer, rows, source)
    else:
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if end is None:
            raise UserError(
                "the tokenizer has no end-of-text token", where=source, hint="choose another language.source"
            )
        special = SpecialTokens(start_id=end if start is None else start, end_id=end)
    # Prompts must begin with only the start token, and answers with none.
    if {special.start_id, special.end_id} & set(tokenizer("a", add_special_tokens=False)["input_ids"]):
        raise UserError("the tokenizer adds special tokens even with add_special_tokens off", where=source)
    return special


def _instructblip_tokens(tokenizer: Any, rows: int, source: str) -> SpecialTokens:
    end = tokenizer.get_vocab().get(_END_TOKEN)
    if end is None:
        raise UserError(
            f"the tokenizer has no {_END_TOKEN}, with which InstructBLIP's prompts begin and answers end",
            where=source,
            hint="take the tokenizer that belongs to the checkpoint",
        )
    if rows in _LLAMA_ROWS and end != _LLAMA_END_ID:
        raise UserError(
            f"{_END_TOKEN} has another id than in LLaMA's vocabulary, with which this model was trained",
            where=source,
            received=end,
            allowed=str(_LLAMA_END_ID),
            hint="take the tokenizer that belongs to the checkpoint",
        )
    return SpecialTokens(start_id=end, end_id=end)


def _require_rows(tokenizer: Any, rows: int, where: str) -> None:
    """UserError if the tokenizer gives an id for which the network has no embedding."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise UserError(
            f"the tokenizer knows more than the network, whose embedding has {rows} rows: {token!r} has id {largest}",
            where=where,
            allowed=f"ids below {rows}",
            hint="take the tokenizer that belongs to the checkpoint",
        )


def _pad_right(rows: Sequence[Sequence[int]], *, fill: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids [B, L] int64 and mask [B, L] bool."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return ids, mask
