"""The report: what runs say of themselves as one HTML page, and their rows beside the paper's tables."""
