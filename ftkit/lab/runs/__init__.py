"""Run notebooks: one run, a grid of runs, their comparison, the report."""
