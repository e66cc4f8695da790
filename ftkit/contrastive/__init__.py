"""Contrastive learning: images and texts in one space (lesson 06)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "losses": ["clip_loss", "siglip_loss"],
        "towers": ["TwoTowers"],
        "rows": ["PairRows", "encode_pairs"],
        "feature_cache": ["cache_towers"],
        "retrieval": ["Retrieval", "alignment", "modality_gap", "uniformity"],
        "zero_shot_classifier": ["class_embeddings", "linear_probe", "zero_shot"],
    },
)
