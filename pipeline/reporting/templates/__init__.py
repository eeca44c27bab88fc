"""Data files of the package: templates."""
