"""What `pipeline plan` answers: the extraction, and the trainings on what it caches."""
