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


def put_stand_ins(
    config: Config, folder: Path, branches: Sequence[str], *, language_layers: int | None = None
) -> Config:
    """Put a stand-in (`stages.weights.stand_in`) in the place of every checkpoint that these branches name.

    The Q-Former's is all that it starts from.

    Args:
        config: of the networks.
        folder: where the stand-ins are written.
        branches: of `config`: encoder, teacher, qformer, language.
        language_layers: layers that are kept of a language model; None: all.

    Raises:
        UserError: a checkpoint is neither on this machine nor a published one whose shapes are known.
    """
    places: dict[str, str] = {}
    changed = {}
    for name in branches:
        branch = getattr(config, name)
        sources = teacher_sources(branch) if name == "teacher" else {"source": branch.source}
        for source in sources.values():
            if source not in places:
                places[source] = str(folder / f"network-{len(places)}")
                write_stand_in(source, Path(places[source]), language_layers=language_layers)
        start = {"start": None} if name == "qformer" else {}
        changed[name] = branch.model_copy(update={key: places[source] for key, source in sources.items()} | start)
    return config.model_copy(update=changed)


@contextmanager
def with_stand_ins(config: Config, branches: Sequence[str]) -> Iterator[Config]:
    """`put_stand_ins` in a temporary folder, which is removed after the block."""
    with tempfile.TemporaryDirectory(prefix="diff-lmm-shapes-") as folder:
        yield put_stand_ins(config, Path(folder), branches)
