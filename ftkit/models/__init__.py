"""Models: loaded and saved, their layers, encoders, heads and text generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loading": ["load", "load_classifier", "load_language_model", "save"],
        "encoders": ["ImageEncoder", "TextEncoder", "load_clip", "load_image_encoder", "load_text_encoder"],
        "architecture": [
            "QUERIES",
            "VALUES",
            "head_names",
            "layer_groups",
            "layers_called",
            "linear_layers",
            "linear_shape",
        ],
        "causal_lm": ["chat_text", "next_token_logits"],
        "generation": ["generate"],
        "heads": ["Heads", "MultiHead"],
        "device": ["choose_device"],
        "modules": ["average_weights", "count_parameters", "snapshot", "weight_distance"],
    },
)
