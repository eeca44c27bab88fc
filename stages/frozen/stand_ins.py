"""A configuration whose checkpoints are stand-ins: the shapes of all networks, whether or not they are here."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from model.config import ModelConfig
from stages.frozen.load import teacher_sources
from stages.weights.stand_in import write_stand_in

Config = TypeVar("Config", bound=ModelConfig)


@contextmanager
def with_stand_ins(config: Config, branches: Sequence[str]) -> Iterator[Config]:
    """Put a stand-in (`stages.weights.stand_in`) in the place of every checkpoint that these branches name.

    They lie in a temporary folder, which is removed after the block.

    Raises:
        UserError: a checkpoint is neither on this machine nor a published one whose shapes are known.
    """
    with tempfile.TemporaryDirectory(prefix="diff-lmm-shapes-") as folder:
        written: dict[str, str] = {}

        def stand_in(source: str) -> str:
            if source not in written:
                written[source] = str(Path(folder) / str(len(written)))
                write_stand_in(source, Path(written[source]))
            return written[source]

        changed = {}
        for name in branches:
            branch = getattr(config, name)
            named = teacher_sources(branch) if name == "teacher" else {"source": branch.source}
            changed[name] = branch.model_copy(update={key: stand_in(source) for key, source in named.items()})
        yield config.model_copy(update=changed)
