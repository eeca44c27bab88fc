"""Connecting to Ray, and who gets which share of a cluster."""
