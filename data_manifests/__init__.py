"""One card for each data set, as YAML."""
