"""A run's folder: configuration, cached data, models, results, training."""
