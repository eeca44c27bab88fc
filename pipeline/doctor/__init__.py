"""Checks of data and machine."""
