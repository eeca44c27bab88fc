"""One script per claim; each writes its figures to a dated JSON in `results/`."""
