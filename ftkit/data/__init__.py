"""Data to learn from: classified texts, captioned images and sequences of tasks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "text": ["encode", "load_text", "shorten"],
        "images": ["load_images"],
        "emoji": ["GROUPS", "INKS", "draw", "jitter"],
        "pairs": ["Pairs", "join"],
        "tasks": ["MANY_DOMAINS", "MANY_TASKS", "TaskSequence", "growing_classes", "many_domains", "many_tasks"],
    },
)
