"""Convert a quantised language model to safetensors, once."""

import contextlib
import errno
import io
import sys
from collections.abc import Iterator
from pathlib import Path


def convert(path: Path, folder: Path, progress: bool = True) -> None:
    """De-quantise a GGUF file, and save the network as float32 safetensors, with its tokenizer.

    ``AutoModelForCausalLM.from_pretrained(folder)`` then takes a second instead of half a minute, and gives the
    same logits as the GGUF file.

    Args:
        path: the ``.gguf`` file.
        folder: the folder to save to.
        progress: whether to print on stderr why this takes long.

    Raises:
        OSError: the folder cannot be written.
    """
    import torch
    import transformers

    if progress:
        print(f"converting {path.name} to safetensors (once, about half a minute)", file=sys.stderr, flush=True)
    with _quiet():
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        # transformers refuses to save a model that it de-quantised: copy the weights to a model that never was.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # safetensors and tokenizers do not raise OSError when the disk is full
            if "os error 28" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from None
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the advice and the progress bars of transformers, which do not help someone who fetches an asset."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
