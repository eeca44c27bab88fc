"""`pipeline synthesize`: write the synthetic data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.screen.console import print_answer, progress_bar
from stages.data.synthetic import DEFAULT_VIDEOS_PER_SPLIT, generate
from stages.errors import UserError
from stages.wording import counted


def run(folder: Path, *, seed: int, sizes: Mapping[str, int] = DEFAULT_VIDEOS_PER_SPLIT) -> None:
    """Generate videos (`sizes` of each split) and annotations into `folder`; nothing if they are there already."""
    with progress_bar("generate", sum(sizes.values()), "video") as bar:
        summary = generate(folder, seed=seed, videos_per_split=sizes, on_video=lambda _done, _total: bar.advance())
    found = "found" if summary.reused else "wrote"
    size = f"{summary.duration_s:.0f} s, {summary.size_bytes / 1e6:.0f} MB"
    print_answer(f"{found} {counted(summary.videos, 'video')}, {size} in {folder}")


def parse_sizes(given: Sequence[str]) -> dict[str, int]:
    """The videos of every split, from `SPLIT=VIDEOS` for those that are not to have their usual size.

    Raises:
        UserError: one is not of that form; whether the split and the number make sense is the generator's to say.
    """
    sizes = dict(DEFAULT_VIDEOS_PER_SPLIT)
    for one in given:
        split, sign, number = one.partition("=")
        if not sign or not number.isdecimal():
            raise UserError("cannot read a size", where="--size", received=one, allowed="SPLIT=VIDEOS, as in train=64")
        sizes[split] = int(number)
    return sizes
