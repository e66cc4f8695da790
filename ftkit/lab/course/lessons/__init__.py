"""The exercises, a file for each lesson; each function ``exercise_…`` of a file describes one of them."""
