"""A model that a run leaves: what is written, its card, and how it is loaded and used."""
