"""Samples and their cached frames as batches, in an order that can be resumed."""
