"""How the network sees its pixels, by the checkpoint's own preprocessor."""

from typing import Any

from model.pixels import PixelStatistics
from stages.errors import UserError
from stages.weights.repository import Repository

_PREPROCESSOR = "preprocessor_config.json"


def preprocessor(repository: Repository) -> dict[str, Any]:
    """The preprocessor's configuration; empty where the checkpoint has none."""
    return {} if repository.find(_PREPROCESSOR) is None else repository.json(_PREPROCESSOR)


def pixel_statistics(repository: Repository, otherwise: PixelStatistics) -> PixelStatistics:
    """Mean and deviation as the checkpoint states them.

    Raises:
        UserError: they are not three numbers each.
    """
    stated = preprocessor(repository)

    def three(name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        values = stated.get(name, default)
        try:
            red, green, blue = map(float, values)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name} is not three numbers",
                where=f"{repository.source}/{_PREPROCESSOR}",
                received=values,
                hint="download the file again",
            ) from error
        return red, green, blue

    return PixelStatistics(three("image_mean", otherwise.mean), three("image_std", otherwise.std))
