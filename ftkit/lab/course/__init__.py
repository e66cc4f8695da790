"""The course: exercises with their checks, guesses before a result, progress, and the editions of the lessons."""
