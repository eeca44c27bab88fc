"""Answers, scores, intervals and paired comparison."""
