"""Stage 1's networks: opened, identified and loaded."""
