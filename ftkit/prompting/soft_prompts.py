"""Soft prompts through peft: prompt tuning (Lester et al., 2021), prefix tuning (Li and Liang, 2021), P-tuning (Liu et
al., 2021).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from peft import (
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftkit.models.causal_lm import next_token_logits, refuse_checkpointing, require_language_model
from ftkit.models.modules import eval_mode, seeded

# peft 0.21 reads a property that transformers has renamed: nothing that a reader could mend
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

TOLERANCE = 1e-3  # of logits, float32 on any device


def add_prompt_tuning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, init_text: str, num_tokens: int = 8
) -> PeftModel:
    """Put trainable embeddings in front of every text, prompt tuning (Lester et al., 2021).

    They start as the embeddings of words, so that the model starts as if these words stood in front of the text. They
    alone train; the language model is frozen. ``save_adapter`` and ``load_adapter`` keep them.

    Args:
        model: a causal language model, without adapters; changed in place.
        tokenizer: its own.
        init_text: the words; their tokens are cut to ``num_tokens``, or repeated until there are as many.
        num_tokens: virtual tokens, n; n H numbers train (H is the width of an embedding).

    Returns:
        The peft model; a PromptClassifier or an CompletionModel around it is what ``fit`` takes.

    Raises:
        ValueError: no causal language model, or one that can't be read so, no words, a number below 1.
    """
    ids = _start(model, tokenizer, init_text, num_tokens)
    with _refusing(model, "prompt tuning"):
        tuned = _add(model, PromptTuningConfig(num_virtual_tokens=num_tokens))
        with torch.no_grad():
            tuned.prompt_encoder["default"].embedding.weight.copy_(model.get_input_embeddings()(ids)[0])
        _require_words(tuned, ids)
    return tuned


def add_prefix_tuning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, init_text: str, num_tokens: int = 8
) -> PeftModel:
    """Put trainable keys and values in front of those of every text, in each layer: prefix tuning (Li and Liang, 2021).

    They start as those of words, as the paper advises for few rows, and are trained directly, without its network. The
    rest is as in ``add_prompt_tuning``; 2 n L H numbers train (L layers), fewer where heads share keys and values.

    Raises:
        ValueError: as ``add_prompt_tuning``; or gradient checkpointing is on, which would drop the prefix.
    """
    ids = _start(model, tokenizer, init_text, num_tokens)
    refuse_checkpointing(model)
    with _refusing(model, "prefix tuning"):
        with eval_mode(model), torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        tuned = _add(model, PrefixTuningConfig(num_virtual_tokens=num_tokens))
        initialize_kv_prefix_from_past_key_values(tuned, past_key_values=[layer[:2] for layer in cache])
        _require_words(tuned, ids)
    return tuned


def add_p_tuning(model: PreTrainedModel, *, num_tokens: int = 8, seed: int = 0) -> PeftModel:
    """Put embeddings in front of every text that a small network makes, P-tuning (Liu et al., 2021).

    The network, of three linear layers as wide as the model, and its inputs start at random and train; saved are only
    the embeddings that it makes, which from then on are trained directly. The rest is as in ``add_prompt_tuning``.

    Args:
        model: a causal language model, without adapters; changed in place.
        num_tokens: virtual tokens.
        seed: of the start; the global chance stays as it was.

    Raises:
        ValueError: no causal language model, or one that can't be read so, a number below 1.
    """
    _require(model, num_tokens)
    with _refusing(model, "P-tuning"):
        return _add(model, PromptEncoderConfig(num_virtual_tokens=num_tokens), seed)


@torch.no_grad()
def nearest_words(model: PeftModel, tokenizer: PreTrainedTokenizerBase, k: int = 3) -> pd.DataFrame:
    """The tokens of the vocabulary that learned virtual tokens come nearest to, by the cosine of their embeddings.

    Near is relative: look at the cosines. A prompt that works may be near words that say something else (Khashabi et
    al., 2022).

    Args:
        model: as ``add_prompt_tuning`` or ``add_p_tuning`` gives it.
        tokenizer: its own.
        k: tokens to name for each virtual one.

    Returns:
        A row a virtual token, numbered from 1: the k tokens in quotes, which show a leading space, and their cosines;
        "distance", Euclidean, to the nearest of them, and "norm", the length of the virtual token itself, to compare.

    Raises:
        ValueError: no soft prompt, or prefix tuning, whose keys and values are no embeddings; k below 1.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if config is None or not config.is_prompt_learning or config.peft_type == PeftType.PREFIX_TUNING:
        raise ValueError(
            f"{type(model).__name__} has no virtual tokens with embeddings of words: give a model with prompt tuning "
            "or P-tuning."
        )
    vocabulary = model.get_input_embeddings()(torch.arange(len(tokenizer), device=model.device)).float()
    if not 1 <= k <= len(vocabulary):
        raise ValueError(f"k={k} nearest tokens of {len(vocabulary):,} can't be named: give a small number, as 3.")
    prompt = model.get_prompt(batch_size=1)[0].float()
    cosines, tokens = (F.normalize(prompt, dim=-1) @ F.normalize(vocabulary, dim=-1).T).topk(k)
    table = pd.DataFrame(index=pd.RangeIndex(1, len(prompt) + 1, name="virtual token"))
    for place in range(k):
        table[f"token {place + 1}"] = [repr(tokenizer.decode([token])) for token in tokens[:, place].tolist()]
        table[f"cosine {place + 1}"] = cosines[:, place].tolist()
    table["distance"] = (prompt - vocabulary[tokens[:, 0]]).norm(dim=-1).tolist()
    table["norm"] = prompt.norm(dim=-1).tolist()
    return table


def _require(model: PreTrainedModel, num_tokens: int) -> None:
    if isinstance(model, PeftModel):
        raise ValueError("A soft prompt is put on a plain language model, and this one has adapters: load it anew.")
    require_language_model(model)
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens!r}: give a whole number from 1.")


def _start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, init_text: str, num_tokens: int) -> Tensor:
    """The token ids that virtual tokens start from, shape (1, n)."""
    _require(model, num_tokens)
    ids = tokenizer(init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"init_text is {init_text!r}, without a token: give words to start from.")
    repeated = (ids * num_tokens)[:num_tokens]
    return torch.tensor([repeated], device=model.device)


def _add(model: PreTrainedModel, config: PromptLearningConfig, seed: int = 0) -> PeftModel:
    config.task_type = TaskType.CAUSAL_LM
    if not isinstance(config, PrefixTuningConfig):  # its size peft reads from the keys and values
        config.token_dim = model.get_input_embeddings().weight.shape[1]
    with seeded(seed):
        tuned = get_peft_model(model, config)
    if tuned.word_embeddings is not model.get_input_embeddings():  # peft guesses by the size
        raise RuntimeError("peft takes another table for its word embeddings")
    return tuned


@torch.no_grad()
def _require_words(tuned: PeftModel, ids: Tensor) -> None:
    """Hold a start from words to what the plain model gives with these words in front."""
    twice = torch.cat([ids, ids], dim=1)
    with eval_mode(tuned):
        last = torch.full_like(ids[:, :1], ids.shape[1] - 1)
        ours = next_token_logits(tuned, ids, torch.ones_like(ids), last)
        theirs = next_token_logits(tuned.get_base_model(), twice, torch.ones_like(twice), last + ids.shape[1])
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    if not difference < TOLERANCE:
        raise RuntimeError(f"the logits differ by {difference:.1e} from those with the words themselves")


@contextmanager
def _refusing(model: PreTrainedModel, method: str) -> Iterator[None]:
    """Where an architecture does not bear the method, leave the model as it was and say so in one sentence."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        for parameter, required in trained:
            parameter.requires_grad_(required)
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{type(model).__name__} does not bear {method} ({first}): use add_lora.") from error
