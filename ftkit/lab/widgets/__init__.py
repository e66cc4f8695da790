"""Widgets of the notebooks: a control for each setting (controls), the control panel, the playground, image search."""
