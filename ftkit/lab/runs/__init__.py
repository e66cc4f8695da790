"""Runs of notebooks: one, a grid, their comparison, the report."""
