"""Recorded studies: their declaration, recording and reading."""
