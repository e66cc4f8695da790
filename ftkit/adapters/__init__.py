"""Methods that train few weights: LoRA, IA3, BitFit and bottleneck adapters (lesson 03)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "lora": ["add_ia3", "add_lora", "bitfit", "load_adapter", "merge", "save_adapter"],
        "bottleneck": ["Bottleneck", "add_adapters", "load_bottleneck", "save_bottleneck"],
        "router": ["TaskRouter"],
    },
)
