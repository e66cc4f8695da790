"""Models and data that are pinned in assets.toml."""
