"""The memory-bank Q-Former in its two forms."""
