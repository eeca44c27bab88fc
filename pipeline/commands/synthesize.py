"""`pipeline synthesize`: write the synthetic data set."""

from pathlib import Path

from pipeline.console import progress_bar, say
from stages.synthetic import DEFAULT_VIDEOS_PER_SPLIT, generate


def run(folder: Path, *, seed: int) -> None:
    """Generate videos and annotations into `folder`; does nothing if they are there already."""
    with progress_bar("generate", sum(DEFAULT_VIDEOS_PER_SPLIT.values()), "videos") as bar:
        summary = generate(folder, seed=seed, on_video=lambda _done, _total: bar.advance())
    found = "found" if summary.reused else "wrote"
    say(f"{found} {summary.videos} videos, {summary.duration_s:.0f} s, {summary.size_bytes / 1e6:.0f} MB in {folder}")
