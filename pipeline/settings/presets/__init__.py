"""Data files of the package: presets."""
