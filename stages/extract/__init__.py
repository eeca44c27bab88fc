"""Stage 1: what an extraction will cost, the work on one video, and handing videos out."""
