"""Widgets of the notebooks: control panel, playground, image search."""
