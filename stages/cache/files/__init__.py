"""Bytes at a place, a directory or a URL: files, locks, logs."""
