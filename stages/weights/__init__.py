"""Published checkpoints by name, and the bundled tiny ones."""
