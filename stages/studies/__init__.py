"""Many trainings as one experiment."""
