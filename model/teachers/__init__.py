"""What gives y*, one file for each family of teachers."""
