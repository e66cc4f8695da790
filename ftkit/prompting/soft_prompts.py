"""Soft prompts with peft: prompt tuning, prefix tuning and P-tuning."""

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

from ftkit.errors import first_line
from ftkit.models.causal_lm import next_token_logits, refuse_checkpointing, require_language_model
from ftkit.models.modules import eval_mode, seeded

# peft 0.21 reads a property that transformers has renamed, and a reader cannot fix that
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

_LOGIT_TOLERANCE = 1e-3  # relative to the largest logit; wide enough for float32 on any device


def add_prompt_tuning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, init_text: str, num_tokens: int = 8
) -> PeftModel:
    """Put trainable embeddings in front of every text: prompt tuning (Lester et al., 2021).

    The embeddings start as those of words, so at first the model behaves as if these words stood in front of the text.
    Only the embeddings train; the language model is frozen. ``save_adapter`` and ``load_adapter`` save and load them.

    Args:
        model: a causal language model without adapters; changed in place.
        tokenizer: the model's tokenizer.
        init_text: words to start from; their tokens are cut off after ``num_tokens``, or repeated up to that number.
        num_tokens: number of virtual tokens, n; n H parameters train, where H is the width of an embedding.

    Returns:
        The peft model; wrap it in a PromptClassifier or a CompletionModel to train it with ``fit``.

    Raises:
        ValueError: the model is not a causal language model, has adapters already or does not support the method;
            ``init_text`` has no tokens; or ``num_tokens`` is not a positive integer.
    """
    ids = _start(model, tokenizer, init_text, num_tokens)
    with _refusing(model, "prompt tuning"):
        tuned = _add(model, PromptTuningConfig(num_virtual_tokens=num_tokens))
        with torch.no_grad():
            tuned.prompt_encoder["default"].embedding.weight.copy_(model.get_input_embeddings()(ids)[0])
        _check_start(tuned, ids)
    return tuned


def add_prefix_tuning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, init_text: str, num_tokens: int = 8
) -> PeftModel:
    """Put trainable keys and values in front of every text, in each layer: prefix tuning (Li and Liang, 2021).

    They start as the keys and values of words, as the paper recommends for few rows, and train directly, without the
    paper's reparametrisation network. Otherwise as ``add_prompt_tuning``. The number of trainable parameters is 2 n L H
    for L layers, less if attention heads share keys and values.

    Args:
        model, tokenizer, init_text, num_tokens: as for ``add_prompt_tuning``.

    Returns:
        The peft model, as from ``add_prompt_tuning``.

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
        _check_start(tuned, ids)
    return tuned


def add_p_tuning(model: PreTrainedModel, *, num_tokens: int = 8, seed: int = 0) -> PeftModel:
    """Put embeddings in front of every text that a small network computes: P-tuning (Liu et al., 2021).

    The network has three linear layers as wide as the model. It and its inputs are initialised at random and train.
    Saving keeps only the embeddings that it computes; after loading, these train directly. Otherwise as
    ``add_prompt_tuning``.

    Args:
        model: a causal language model without adapters; changed in place.
        num_tokens: number of virtual tokens.
        seed: seed of the random start; the global random state is left unchanged.

    Returns:
        The peft model, as from ``add_prompt_tuning``.

    Raises:
        ValueError: the model is not a causal language model, has adapters already or does not support P-tuning; or
            ``num_tokens`` is not a positive integer.
    """
    _require(model, num_tokens)
    with _refusing(model, "P-tuning"):
        return _add(model, PromptEncoderConfig(num_virtual_tokens=num_tokens), seed)


@torch.no_grad()
def nearest_words(model: PeftModel, tokenizer: PreTrainedTokenizerBase, k: int = 3) -> pd.DataFrame:
    """Find the vocabulary tokens nearest to each virtual token, by the cosine of their embeddings.

    Nearest does not mean near: look at the cosines. A soft prompt that works well may be nearest to words that say
    something else (Khashabi et al., 2022).

    Args:
        model: a model from ``add_prompt_tuning`` or ``add_p_tuning``.
        tokenizer: the model's tokenizer.
        k: number of tokens to list for each virtual token.

    Returns:
        A table with one row per virtual token, numbered from 1. The columns are the k nearest tokens, quoted so that a
        leading space shows, with their cosines; "distance", the Euclidean distance to the nearest of them; and "norm",
        the length of the virtual token, for comparison.

    Raises:
        ValueError: the model has no soft prompt, or prefix tuning, whose keys and values are not embeddings; or k is
            not between 1 and the size of the vocabulary.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if config is None or not config.is_prompt_learning or config.peft_type == PeftType.PREFIX_TUNING:
        raise ValueError(
            f"{type(model).__name__} has no virtual tokens with embeddings: give a model with prompt tuning or "
            "P-tuning."
        )
    vocabulary = model.get_input_embeddings()(torch.arange(len(tokenizer), device=model.device)).float()
    if not 1 <= k <= len(vocabulary):
        raise ValueError(
            f"k is {k}, and the vocabulary has {len(vocabulary):,} tokens: give a small number, such as 3."
        )
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
        raise ValueError("A soft prompt needs a model without adapters, and this one has some: load the model again.")
    require_language_model(model)
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens!r}: give an integer of at least 1.")


def _start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, init_text: str, num_tokens: int) -> Tensor:
    """Encode the words that the virtual tokens start from, shape (1, n)."""
    _require(model, num_tokens)
    ids = tokenizer(init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"init_text is {init_text!r} and has no tokens: give words to start from.")
    repeated = (ids * num_tokens)[:num_tokens]
    return torch.tensor([repeated], device=model.device)


def _add(model: PreTrainedModel, config: PromptLearningConfig, seed: int = 0) -> PeftModel:
    config.task_type = TaskType.CAUSAL_LM
    if not isinstance(config, PrefixTuningConfig):  # peft itself computes the size of keys and values
        config.token_dim = model.get_input_embeddings().weight.shape[1]
    with seeded(seed):
        tuned = get_peft_model(model, config)
    if tuned.word_embeddings is not model.get_input_embeddings():  # peft guesses by size which layer it is
        raise RuntimeError("peft uses another layer as word embeddings")
    return tuned


@torch.no_grad()
def _check_start(tuned: PeftModel, ids: Tensor) -> None:
    """Check that the tuned model starts with the logits of the plain model with the words in front of the text."""
    twice = torch.cat([ids, ids], dim=1)
    with eval_mode(tuned):
        last = torch.full_like(ids[:, :1], ids.shape[1] - 1)
        ours = next_token_logits(tuned, ids, torch.ones_like(ids), last)
        theirs = next_token_logits(tuned.get_base_model(), twice, torch.ones_like(twice), last + ids.shape[1])
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    if not difference < _LOGIT_TOLERANCE:
        raise RuntimeError(f"the logits differ by {difference:.1e} from those with the words in front")


@contextmanager
def _refusing(model: PreTrainedModel, method: str) -> Iterator[None]:
    """If the architecture does not support the method, leave the model unchanged and say so in one sentence."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        for parameter, required in trained:
            parameter.requires_grad_(required)
        reason = first_line(error)
        raise ValueError(f"{type(model).__name__} does not support {method} ({reason}): use add_lora.") from error
