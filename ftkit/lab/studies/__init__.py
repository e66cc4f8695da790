"""Recorded studies: declared, run, read."""
