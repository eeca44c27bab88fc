"""Stage 2's model: put together from checkpoints, saved, exported and loaded again."""
