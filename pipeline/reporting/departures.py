"""Where the project's numbers depart from MA-LMM and the paper: one list, for the report and docs/method.md alike."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from itertools import count, groupby
from typing import Any

import yaml
from pydantic import Field, TypeAdapter

from pipeline.settings.config import PipelineConfig, setting
from stages.records import FrozenRecord

_LIST = "departures.yaml"


class Departure(FrozenRecord):
    """One departure.

    Attributes:
        name: what is done otherwise.
        there: how MA-LMM or the paper does it, which `source` shows.
        source: files of MA-LMM's repository, unless another is named.
        here: how it is done here by default.
        effect: what it does to the numbers, as far as that is known.
        when: configuration keys and the values of runs that it concerns; all, if there are none.
        switch: keys, and the values with which it is done as there.
    """

    name: str
    there: str
    source: str
    here: str
    why: str
    effect: str
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    switch: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    @property
    def remark(self) -> str:
        return f"{self.name}. Here: {self.here}. There: {self.there}. Effect: {self.effect}"

    def concerns(self, config: PipelineConfig) -> bool:
        """Whether a run with these settings departs so: it is of the kind, and every switch stands at its default."""
        usual = PipelineConfig()
        of_kind = all(setting(config, key) in values for key, values in self.when.items())
        return of_kind and all(setting(config, key) == setting(usual, key) for key in self.switch)


@lru_cache
def departures() -> tuple[Departure, ...]:
    """All of them, in the order of their numbers, which begin at 1."""
    text = resources.files("pipeline.reporting").joinpath(_LIST).read_text("utf-8")
    return TypeAdapter(tuple[Departure, ...]).validate_python(yaml.safe_load(text))


def departures_of(config: PipelineConfig) -> tuple[int, ...]:
    """Numbers of the departures of a run with these settings."""
    return tuple(number for number, one in enumerate(departures(), start=1) if one.concerns(config))


def is_as_there(key: str, value: Any) -> bool:
    """Whether this value of the configuration switches a departure off."""
    return any(value in one.switch.get(key, ()) for one in departures())


def in_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in few characters: 1, 2, 3, 5 -> 1-3,5."""
    place = count()
    runs = [list(run) for _, run in groupby(numbers, key=lambda number: number - next(place))]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def remarks_of(numbers: Sequence[int]) -> dict[int, str]:
    """The lines that belong to these numbers."""
    return {number: departures()[number - 1].remark for number in numbers}
