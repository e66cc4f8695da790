"""Continual learning: tasks learned one after the other, and strategies against forgetting (lesson 05)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "sequence": ["SequenceRun", "evaluate_tasks", "learn_sequence"],
        "strategies": ["STRATEGIES", "Stage", "Strategy", "make_strategy"],
        "penalties": ["Distillation", "EWC", "L2SP"],
        "fisher": ["diagonal_fisher"],
        "replay": ["ReplayBuffer"],
        "accuracy_matrix": ["AccuracyMatrix"],
    },
)
