"""A small made-up data set of real H.264 videos whose seven answers are all visible in the pixels."""

from stages.data.synthetic.generator import DEFAULT_VIDEOS_PER_SPLIT, SyntheticSummary, generate

__all__ = ["DEFAULT_VIDEOS_PER_SPLIT", "SyntheticSummary", "generate"]
