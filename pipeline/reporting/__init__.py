"""The report: what runs recorded as one HTML page, and their rows beside the paper's tables."""
