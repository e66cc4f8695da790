"""The loop and what it trains (lessons 01 and 02)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loop": ["evaluate", "fit", "lr_factor", "make_optimizer", "token_loss"],
        "state": ["History", "TrainSettings", "TrainingRun"],
        "callbacks": ["Callback", "Checkpoint", "EarlyStopping"],
        "losses": ["ModelWithLoss", "Penalty"],
        "batching": ["evaluation_batches", "make_batch", "row_lengths", "training_batches"],
        "freezing": ["GradualUnfreezing", "LayerwiseRates", "freeze", "group_table", "layer_rates"],
        "feature_cache": ["cache_frozen_layers"],
        "monitor": ["Meter"],
    },
)
