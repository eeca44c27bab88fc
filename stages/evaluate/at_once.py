"""How many samples are answered at once, and what is done where the memory does not hold them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from model.config import LanguageConfig
from model.diff_lmm import DiffLMM
from stages.batches.windows import Batch, WindowDataset
from stages.config import EvaluateConfig
from stages.data.manifest import Sample
from stages.device import unless_out_of_memory
from stages.errors import LackOfMemoryError
from stages.free_memory import usable_memory
from stages.networks.memory_law import ClipShape, row_bytes, watch_bytes
from stages.networks.tokens import Tokenizers
from stages.wording import counted

Found = TypeVar("Found")
_LOG = logging.getLogger(__name__)

# As features are stored, or widened from int8.
_FEATURE_BYTES = 2
MOST_SAMPLES, MOST_ROWS = 32, 256
"""No more samples, and rows of a ranking, go through the language model at once unless the settings name a number."""


def clip_shape(data: WindowDataset, samples: Sequence[Sample], tokenizers: Tokenizers, queries: int) -> ClipShape:
    """The largest clip of some samples that a data set serves: frames, patches, and the tokens of the longest texts."""
    frames, patches, _ = data[0].features.shape
    prompts = [sample.prompt_text for sample in samples]
    words, sequence = tokenizers.longest(prompts, [sample.answer for sample in samples])
    return ClipShape(frames, patches, words, queries + sequence)


@dataclass
class AtOnce:
    """How much goes through the networks at once; what does not fit is halved for good.

    Attributes:
        samples: most of a batch.
        rows: most candidates times samples of a ranking.
        may_halve: false where other processes have to make the same calls of the model.
    """

    samples: int
    rows: int = MOST_ROWS
    may_halve: bool = True

    @classmethod
    def of(cls, config: EvaluateConfig, *, samples: int = MOST_SAMPLES, rows: int = MOST_ROWS) -> "AtOnce":
        """As the settings have it; so many where they leave it open."""
        return cls(
            samples if config.batch_size == "auto" else config.batch_size,
            rows if config.rank_rows == "auto" else config.rank_rows,
        )

    @classmethod
    def that_fits(
        cls,
        model: DiffLMM,
        shape: ClipShape,
        language: LanguageConfig,
        config: EvaluateConfig,
        device: torch.device,
        *,
        read_ahead: int = 0,
        to_come: int = 0,
    ) -> "AtOnce":
        """As the settings have it; what fits into the memory that is free where they leave it open.

        Args:
            model: on its device.
            shape: the largest clip.
            language: how answers are searched for.
            config: the settings.
            device: of the model.
            read_ahead: batches that wait in the machine's memory.
            to_come: bytes that will be taken on the device before the first sample is answered.
        """
        network = model.language.model
        bytes_each = network.get_input_embeddings().weight.dtype.itemsize
        row = row_bytes(network.config, shape.sequence + language.max_new_tokens, bytes_each=bytes_each)
        copies = 1 + read_ahead if device.type == "cpu" else 1
        sample = watch_bytes(model.qformer, shape, feature_bytes=_FEATURE_BYTES * copies) + language.num_beams * row
        free = usable_memory(device) - to_come
        samples = max(1, min(MOST_SAMPLES, free // sample))
        # The samples' own features and prefixes are there beside the rows.
        rows = max(1, min(MOST_ROWS, (free - samples * watch_bytes(model.qformer, shape)) // row))
        return cls.of(config, samples=samples, rows=rows)

    def parts(self, batch: Batch, work: Callable[[Batch], Found]) -> Iterator[Found]:
        """What `work` makes of a batch, or of its parts where it does not fit.

        Raises:
            LackOfMemoryError: not even one sample fits.
        """
        start = 0
        while start < len(batch.samples):
            part = batch.rows(slice(start, start + self.samples))
            found = unless_out_of_memory(partial(work, part))
            if found is not None:
                yield found
                start += len(part.samples)
                continue
            if self.samples == 1 or not self.may_halve:
                raise too_little_memory(len(part.samples))
            self.samples = -(-len(part.samples) // 2)
            _LOG.warning("too little memory: going on with evaluate.batch_size=%d, answers are the same", self.samples)

    def ranked(self, work: Callable[[int], Found], samples: int) -> Found | None:
        """What `work` gives with as many rows as fit; None where one candidate of each of the samples does not."""
        while (
            (found := unless_out_of_memory(lambda: work(self.rows))) is None and self.rows > samples and self.may_halve
        ):
            self.rows = max(samples, self.rows // 2)
            _LOG.warning("too little memory: going on with evaluate.rank_rows=%d, scores are the same", self.rows)
        return found


def too_little_memory(samples: int) -> LackOfMemoryError:
    """What to say where so many samples do not fit, and fewer cannot be taken."""
    return LackOfMemoryError(
        f"the memory does not hold {counted(samples, 'sample')} while answering",
        hint="set language.quantize=nf4, language.num_beams=1 or a smaller evaluate.batch_size",
        exit_code=1,
    )
