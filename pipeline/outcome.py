"""What is told of a training that has ended."""

import json
from dataclasses import asdict, dataclass

from stages.networks.checkpoint import Position
from stages.train.trainer import Ending


@dataclass(frozen=True)
class Outcome:
    """How a training ended, of how many steps, with how many trained values."""

    ending: Ending
    total_steps: int
    trained_count: int

    def to_json(self) -> str:
        """As text, to be sent."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """Read back what `to_json` wrote."""
        content = json.loads(text)
        ending = content.pop("ending")
        at, best = (None if (one := ending.pop(name)) is None else Position(**one) for name in ("at", "best"))
        assert at is not None
        return cls(Ending(at, best, **ending), **content)
