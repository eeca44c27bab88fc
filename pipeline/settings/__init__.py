"""The configuration tree, its presets, and where things are on disk."""
